"""Tests of segments: no wrong row is ever read, whatever attempts write at the same time and whatever is damaged."""

import dataclasses
import random
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.requests import Completion
from pipeline.core.errors import StorageError
from pipeline.core.schema import RESULT_SCHEMA
from pipeline.core.types import RowResult, WorkUnit
from pipeline.output.part import result_table, row_key, to_parquet
from pipeline.output.records import NotOursError, unit_fields
from pipeline.output.segments import (
    RECORD_KEY,
    SegmentRecord,
    folder_of,
    from_segment,
    read_record,
    segment_name,
    to_segment,
)
from pipeline.output.unit_store import UnitStore
from pipeline.prompts.setup import PromptSetup
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, not_utf8, one_piece, with_stamp

ROWS, FIRST_ROW = 12, 100
UNIT = one_piece("a-000100", "/in/a.parquet", "a.parquet", FIRST_ROW, ROWS, 4096, "mtime:1")
DIGEST = "f" * 64
WRITERS = ("a" * 32, "b" * 32)


def rows_of(indexes: list[int], text: str, attempt: int = 1) -> pa.Table:
    """Return finished rows; the text of a completion says which row it is and who made it."""
    results = [
        RowResult(i, Completion(key=row_key(UNIT, i), text=f"{text} {i}", finish_reason="stop"), "ar", attempt, "r")
        for i in indexes
    ]
    return result_table(UNIT, results)


def store_in(folder: Path) -> UnitStore:
    (folder / "_job").mkdir(exist_ok=True)  # as a run has it, or nothing would be written
    return UnitStore(make_job("/in", folder), DIGEST, pa.schema([]), PromptSetup(("prompt",)), "r")


@dataclass(frozen=True)
class Flush:
    """A flush of an attempt, and what happens to its file."""

    writer: int
    indexes: list[int]
    fate: str
    at: float
    """The place of the damage, as a share of the file's length."""


flushes = st.builds(
    Flush,
    writer=st.integers(0, 1),
    indexes=st.lists(st.integers(0, ROWS - 1), max_size=8),  # a row may be in it twice
    fate=st.sampled_from(["kept", "kept", "kept", "truncated", "flipped", "deleted", "foreign", "rewritten", "moved"]),
    at=st.floats(0, 1, exclude_max=True),
)


def spoil(path: Path, flush: Flush) -> None:
    data = bytearray(path.read_bytes())
    at = int(flush.at * len(data))
    if flush.fate == "truncated":
        path.write_bytes(data[:at])
    elif flush.fate == "flipped":
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
    elif flush.fate == "deleted":
        path.unlink()


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(flushes, max_size=8))
def test_any_flushes_of_two_attempts_with_any_damage(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Flush]
) -> None:
    """Each row that an intact segment holds is read once, from the first such segment by name. All other segments are
    reported."""
    root = tmp_path_factory.mktemp("out")
    store = store_in(root)
    folder = root / folder_of(UNIT.id)
    texts: dict[str, tuple[list[int], str]] = {}
    spoilt = 0
    for number, flush in enumerate(drawn):
        text = f"{flush.writer} {number}"
        of_unit, digest = UNIT, DIGEST
        if flush.fate == "foreign":
            digest = "0" * 64
        elif flush.fate == "rewritten":  # the input file was rewritten since
            of_unit = with_stamp(UNIT, "mtime:2")
        elif flush.fate == "moved":  # a segment of another unit in this one's folder
            of_unit = dataclasses.replace(UNIT, id="a-000200")
        rows = rows_of(flush.indexes, text, attempt=flush.writer + 1)
        data = to_segment(of_unit, digest, rows, prompt_rules=2, writer=WRITERS[flush.writer], attempt=1)
        name = segment_name(WRITERS[flush.writer], number, data)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)  # readers see no difference from Storage.create, which is slower
        spoil(folder / name, flush)
        spoilt += flush.fate not in ("kept", "deleted")
        if flush.fate == "kept":
            texts[name] = flush.indexes, text
    expected: dict[int, str] = {}
    for _, (indexes, text) in sorted(texts.items()):
        for index in indexes:
            expected.setdefault(index, f"{text} {index}")
    found = store.read_segments(UNIT)
    assert len(found.ignored) == spoilt
    assert found.table.schema.equals(RESULT_SCHEMA)
    read = found.table.to_pylist()
    assert [row["source_row"] for row in read] == [FIRST_ROW + index for index in sorted(expected)]
    assert {row["source_row"] - FIRST_ROW: row["completion"] for row in read} == expected
    store.remove_segments(UNIT)
    assert not list(folder.iterdir() if folder.exists() else [])


def test_what_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    """All columns are the same after the calls that a replica makes. A second write after a lost answer adds
    nothing."""
    store = store_in(tmp_path)
    rows = rows_of([3, 1], "x", attempt=4)
    for _ in range(2):
        store.write_segment(UNIT, rows, writer=WRITERS[0], number=1, attempt=4)
    found = store.read_segments(UNIT)
    assert found.table == rows.take([1, 0])
    assert not found.ignored
    assert len(list((tmp_path / folder_of(UNIT.id)).iterdir())) == 1


def test_every_flipped_byte_and_every_cut_is_found() -> None:
    data = to_segment(UNIT, DIGEST, rows_of([0, 5], "x"), prompt_rules=2, writer=WRITERS[0], attempt=1)
    name = segment_name(WRITERS[0], 1, data)
    assert from_segment(name, data, UNIT, DIGEST).num_rows == 2
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        for damaged in (flipped, data[:at]):
            with pytest.raises(NotOursError, match="truncated or damaged"):
                from_segment(name, damaged, UNIT, DIGEST)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_bytes_get_through_as_rows_of_elsewhere(seed: int) -> None:
    """The bytes come with a checksum that fits. They are refused, or they are rows of this unit in the right
    columns."""
    draw = random.Random(seed)
    good = to_segment(UNIT, DIGEST, rows_of(list(range(ROWS)), "text", 2), prompt_rules=2, writer=WRITERS[0], attempt=1)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 20])):
            at = draw.randrange(draw.choice([0, len(data) - 4000]), len(data))  # the footer is at the end
            data[at] = draw.choice([0, 255, data[at] ^ 1 << draw.randrange(8)])
        try:
            table = from_segment(segment_name(WRITERS[0], 1, bytes(data)), bytes(data), UNIT, DIGEST)
        except NotOursError:
            continue
        assert table.schema.equals(RESULT_SCHEMA)
        assert set(table["source_row"].to_pylist()) <= set(range(100, 100 + ROWS))


FOREIGN = [
    ("fingerprint", DIGEST[:-1] + "0", UNIT, r"its fingerprint is '.*0', not"),
    ("unit", DIGEST, dataclasses.replace(UNIT, id="b"), "it holds unit b, not a-000100"),
    (
        "cut",
        DIGEST,
        one_piece(UNIT.id, "", "a.parquet", FIRST_ROW, 99),
        "its piece 1 is rows 100 to 198 of a.parquet, not",
    ),
    ("file", DIGEST, with_stamp(UNIT, "mtime:2"), "it was made of another version of a.parquet"),
]


@pytest.mark.parametrize(("digest", "unit", "text"), [case[1:] for case in FOREIGN], ids=[case[0] for case in FOREIGN])
def test_a_foreign_segment_is_left_out_and_named(tmp_path: Path, digest: str, unit: WorkUnit, text: str) -> None:
    data = to_segment(unit, digest, rows_of([1], "x"), prompt_rules=2, writer=WRITERS[0], attempt=1)
    name = segment_name(WRITERS[0], 1, data)
    with pytest.raises(NotOursError, match=text):
        from_segment(name, data, UNIT, DIGEST)
    assert read_record(pa.BufferReader(data))[0] == SegmentRecord(**unit_fields(unit, 2), fingerprint=digest)
    Storage(str(tmp_path)).write(f"{folder_of(UNIT.id)}/{name}", data)
    (note,) = store_in(tmp_path).read_segments(UNIT).ignored
    assert note.startswith(f"segment _job/segments/a-000100/{name} is left out: it")
    assert note.endswith("its rows are generated again")


def test_a_segment_with_other_contents_than_rows_of_its_unit_is_refused() -> None:
    rows = rows_of([1], "x")
    at = rows.schema.get_field_index("source_row")
    column = rows.schema.get_field_index("source_file")
    wrong = [
        rows.set_column(at, "source_row", pa.array([99], pa.int64())),
        rows.set_column(at, "source_row", pa.array([112], pa.int64())),
        rows.set_column(at, "source_row", pa.array([None], pa.int64())),
        rows.set_column(column, "source_file", pa.array(["b.parquet"])),
        rows.set_column(column, "source_file", pa.array([None], pa.string())),
        rows.drop_columns(["error"]),
        rows_of(list(range(ROWS)) * 2, "x"),
    ]
    for table in wrong:
        data = to_segment(UNIT, DIGEST, table, prompt_rules=2, writer=WRITERS[0], attempt=1)
        with pytest.raises(
            NotOursError, match=r"rows that are not in the unit|columns are not those of|24 rows, the unit"
        ):
            from_segment(segment_name(WRITERS[0], 1, data), data, UNIT, DIGEST)
    records = [b"x", b"[]", b"[" * 99999, b"{}", b'{"unit": 3}']
    no_record = [to_parquet(rows.replace_schema_metadata({RECORD_KEY: record})) for record in records]
    for data in (b"", b"PAR1", to_parquet(rows), *no_record):
        with pytest.raises(NotOursError, match=r"cannot be read|no record of|not JSON|no unit|unit is 3|not a JSON"):
            from_segment(segment_name(WRITERS[0], 1, data), data, UNIT, DIGEST)
        with pytest.raises(NotOursError):
            read_record(pa.BufferReader(data))


def test_text_that_is_not_utf_8_is_refused() -> None:
    """Such text would make the whole part unreadable."""
    rows = rows_of([1, 2], "x")
    broken = rows.set_column(rows.schema.get_field_index("completion"), "completion", not_utf8(b"good", b"\xff"))
    data = to_segment(UNIT, DIGEST, broken, prompt_rules=2, writer=WRITERS[0], attempt=1)
    with pytest.raises(NotOursError, match="cannot be read"):
        from_segment(segment_name(WRITERS[0], 1, data), data, UNIT, DIGEST)


def test_strange_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    """A file that a killed process left half written is not even named. A file that claims to be a segment is."""
    folder = tmp_path / folder_of(UNIT.id)
    folder.mkdir(parents=True)
    (folder / f".{WRITERS[0]}-000001.parquet.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("x")
    pq.write_table(rows_of([1], "x"), folder / "mine.parquet")
    found = store_in(tmp_path).read_segments(UNIT)
    assert found.table.num_rows == 0
    (note,) = found.ignored
    assert "mine.parquet is left out: its name is not that of a segment" in note


def test_a_store_that_fails_is_a_storage_error(tmp_path: Path) -> None:
    """Writing raises a StorageError. Removing does not, because it is only a courtesy, and reading finds no
    segments."""
    (tmp_path / "_job").mkdir()
    (tmp_path / "_job" / "segments").write_text("a file where the folder should be")
    store = store_in(tmp_path)
    with pytest.raises(StorageError, match="cannot create"):
        store.write_segment(UNIT, rows_of([1], "x"), writer=WRITERS[0], number=1, attempt=1)
    store.remove_segments(UNIT)
    assert store.read_segments(UNIT).table.num_rows == 0
