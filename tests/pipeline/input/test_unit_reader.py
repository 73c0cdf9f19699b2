"""Tests of reading units: bad rows become error rows, every row is read once, and the memory stays bounded."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.job import Job
from pipeline.core.errors import InputError, StorageError
from pipeline.input import limits
from pipeline.input.unit_reader import UnitData
from pipeline.storage.storage import Storage
from tests import memory
from tests.pipeline.cases import make_job, not_utf8, one_piece, part_of, plan_of, prompts, reader_of, write

ROOT = Path(__file__).parents[3]


def read_all(job: Job) -> list[UnitData]:
    reader = reader_of(job)
    data = [reader.read(unit) for unit in plan_of(job).units]
    reader.close()
    return data


def read_one(tmp_path: Path, section: dict[str, Any] | None = None, **columns: Any) -> UnitData:
    write(tmp_path / "in/a.parquet", **columns)
    (data,) = read_all(make_job(tmp_path / "in", tmp_path / "out", input=section or {}))
    return data


def test_rows_carry_their_key_and_place(tmp_path: Path) -> None:
    write(tmp_path / "in/sub/a.parquet", prompt=prompts(10), group=3)
    first, second, third, last = read_all(make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 3}))
    assert [row.prompt for data in (first, second, third, last) for row in data.rows] == prompts(10)
    row = second.rows[1]
    assert (row.key, row.index, row.source_row, row.error) == ("sub/a.parquet#4", 1, 4, None)
    assert second.columns["id"].to_pylist() == ["sub/a.parquet#3", "sub/a.parquet#4", "sub/a.parquet#5"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60),
    group=st.integers(1, 60),
    order=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 20)), min_size=1, max_size=8),
    batch=st.integers(1, 7),
)
def test_any_range_in_any_order(
    tmp_path: Path, rows: int, group: int, order: list[tuple[int, int]], batch: int
) -> None:
    """The reader remembers its position, and this never changes what it reads: forward, backward, across row groups, or
    the same rows twice."""
    file = write(tmp_path / "a.parquet", prompt=prompts(rows), n=list(range(rows)), group=group)
    reader = reader_of(make_job(file, tmp_path / "out", input={"carry": ["n"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BATCH_ROWS", batch)
        for first, count in order:
            first, count = first % rows, min(count, rows - first % rows)
            data = reader.read(one_piece("u", str(file), "a.parquet", first, count))
            assert [row.prompt for row in data.rows] == prompts(count, first)
            assert data.columns["n"].to_pylist() == list(range(first, first + count))
    reader.close()


def structs(rows: int, *kinds: Any, names: str) -> "pa.Array[Any]":
    """Return structs whose fields have these types and names, and are null in every row."""
    return pa.StructArray.from_arrays([pa.nulls(rows, kind) for kind in kinds], names=list(names))


@pytest.mark.parametrize("names", ["ab", "aa"])
def test_a_nested_field_may_be_null_in_some_files_of_a_unit(tmp_path: Path, names: str) -> None:
    """This holds even for structs in which a name occurs twice, which pyarrow does not promote."""
    for number, kind in enumerate([pa.null(), pa.string(), pa.null()]):
        write(tmp_path / f"in/{number}.parquet", prompt=prompts(2), c=structs(2, kind, pa.int8(), names=names))
    (data,) = read_all(make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["c"]}))
    assert data.columns.schema.field("c").type == structs(0, pa.string(), pa.int8(), names=names).type
    assert [len(data.rows), data.columns.num_rows] == [6, 6]


def test_a_null_field_of_structs_can_be_read_from_any_row_on(tmp_path: Path) -> None:
    """pyarrow cannot cast such a slice to its own type."""
    write(tmp_path / "in/a.parquet", prompt=prompts(9), c=structs(9, pa.null(), pa.int8(), names="ab"))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["c"]}, output={"rows_per_file": 3})
    assert [part_of(data, plan_of(job))[:4] for data in read_all(job)] == 3 * [b"PAR1"]


def test_consecutive_units_of_a_giant_group_are_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", prompt=prompts(10_000))
    passes: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counting(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    read_all(make_job(file, tmp_path / "out", output={"rows_per_file": 500}))
    assert len(passes) == 1


def test_bad_prompts_become_error_rows(tmp_path: Path) -> None:
    data = read_one(tmp_path, prompt=not_utf8(b"good", None, b"", b"ab\xff", "größe".encode()))
    assert [(row.prompt, row.error) for row in data.rows] == [
        ("good", None),
        (None, "prompt is null"),
        (None, "prompt is empty"),
        (None, "column 'prompt' holds bytes that are not UTF-8 (byte 2)"),
        ("größe", None),
    ]


@pytest.mark.parametrize("kind", ["large", "view", "dictionary"])
def test_bad_prompts_in_every_string_type(tmp_path: Path, kind: str) -> None:
    plain = not_utf8(b"good", b"\xff", None)
    columns: dict[str, Callable[[], pa.Array[Any]]] = {
        "large": lambda: plain.cast(pa.large_string()),
        "view": lambda: plain.cast(pa.binary()).cast(pa.binary_view()).view(pa.string_view()),
        "dictionary": lambda: pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), plain.slice(0, 2)),
    }
    column = columns[kind]()
    data = read_one(tmp_path, {"carry": ["copy"]}, prompt=column, copy=column)
    assert [row.prompt for row in data.rows] == ["good", None, None]
    assert "not UTF-8 (byte 0)" in str(data.rows[1].error)
    assert data.columns["copy"].to_pylist() == ["good", "\ufffd", None]


@pytest.mark.parametrize("index", [pa.int8(), pa.int32()], ids=str)
def test_bad_bytes_in_dictionaries_cost_their_row_alone(tmp_path: Path, index: pa.DataType) -> None:
    """Other columns keep the types that the writer stored, although pyarrow reads the file without these types."""
    indices: pa.Array[Any] = pa.array([0, 1, None], index)
    column = pa.DictionaryArray.from_arrays(indices, not_utf8(b"good", b"\xff"))
    many = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), column)
    when = pa.array([1, 2, 3], pa.timestamp("us", "Europe/Berlin"))
    gap = pa.array([1, 2, 3], pa.duration("us"))
    carry = {"many": many, "record": pa.StructArray.from_arrays([column], ["x"]), "when": when, "gap": gap}
    data = read_one(tmp_path, {"carry": list(carry)}, prompt=column, **carry)
    assert [row.prompt for row in data.rows] == ["good", None, None]
    assert "not UTF-8 (byte 0)" in str(data.rows[1].error)
    assert data.columns["many"].to_pylist() == [["good"], None, [None]]
    assert data.columns["record"].to_pylist() == [{"x": "good"}, None, {"x": None}]
    assert (data.columns["when"].type, data.columns["gap"].type) == (when.type, gap.type)
    assert data.columns["when"].combine_chunks() == when


def test_carried_bytes_that_would_break_the_part(tmp_path: Path) -> None:
    """A part must be readable whatever the input holds. The row becomes an error row, and its cell keeps what can be
    read."""
    nested = pa.StructArray.from_arrays([not_utf8(b"x", b"y", b"\xff")], ["s"])
    data = read_one(
        tmp_path,
        {"id_column": "key", "carry": ["note", "nested"]},
        prompt=["a", "b", "c"],
        key=not_utf8(b"k1", b"k\xfe2", None),
        note=not_utf8(b"\xffz", b"fine", b"fine"),
        nested=nested,
    )
    assert data.columns["id"].to_pylist() == ["k1", "k\ufffd2", None]
    assert data.columns["note"].to_pylist() == ["\ufffdz", "fine", "fine"]
    assert data.columns["nested"].to_pylist() == [{"s": "x"}, {"s": "y"}, None]
    assert [bool(row.error) for row in data.rows] == [True, True, True]
    assert "column 'note' holds bytes" in str(data.rows[0].error)
    assert "column 'key' holds bytes" in str(data.rows[1].error)
    assert "column 'nested' holds bytes" in str(data.rows[2].error)
    data.columns.validate(full=True)


@pytest.mark.slow
def test_templates(tmp_path: Path) -> None:
    section = {"template": "{{ title|upper }}: {% for t in tags %}[{{ t }}]{% endfor %} {{ 10 // n }}{{ meta.lang }}"}
    data = read_one(
        tmp_path,
        section,
        title=["a", None, "c", "d"],
        tags=[["x", "y"], [], ["z"], []],
        n=[2, 5, 0, 1],
        meta=[{"lang": "en"}, {"lang": "de"}, {"lang": "fr"}, None],
    )
    assert [row.prompt for row in data.rows] == ["A: [x][y] 5en", None, None, None]
    assert str(data.rows[1].error).startswith("template: column 'title' is null")
    assert data.rows[2].error == "template: integer division or modulo by zero"
    assert str(data.rows[3].error).startswith("template: column 'meta' is null")


@pytest.mark.slow
def test_a_template_that_makes_nothing_is_an_error_row(tmp_path: Path) -> None:
    data = read_one(tmp_path, {"template": "{% if n %}{{ n }}{% endif %}"}, n=[0, 3])
    assert [(row.prompt, row.error) for row in data.rows] == [(None, "prompt is empty"), ("3", None)]


@pytest.mark.slow
def test_a_template_cannot_reach_the_machine(tmp_path: Path) -> None:
    data = read_one(tmp_path, {"template": "{{ n.__class__.__mro__ }}"}, n=["x"])
    assert "unsafe" in str(data.rows[0].error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "template", ["{{ b.encode('latin-1').decode('utf-8', 'surrogateescape') }}", "{{ '\\ud800' ~ b }}"]
)
def test_a_prompt_with_a_lone_surrogate_is_an_error_row(tmp_path: Path, template: str) -> None:
    data = read_one(tmp_path, {"template": template}, b=["\xff"])
    assert data.rows[0].error == "prompt holds characters that are not Unicode text (lone surrogate)"


@pytest.mark.slow
def test_an_error_that_quotes_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    data = read_one(tmp_path, {"template": "{{ n['\\ud800'] }}"}, n=[{"a": 1}])
    assert r"\ud800" in str(data.rows[0].error)
    part_of(data, plan_of(make_job(tmp_path / "in", tmp_path / "out", input={"template": "{{ n }}"})))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for _ in 'x' * 99 %}{{ '%*d' | format(n, 1) }}{% endfor %}", "prompt has 17000000 characters or more"),
        ("{{ '%*d' | format(n * 1000, 1) }}", "template: a format with a width above 16000000"),
        ("{{ '%.*f' % (n * 1000, 1) }}", "template: a format with a width above 16000000"),
        ("{{ 'xy' * n * 1000 }}", "template: a product of more than 16000000 characters"),
        ("{{ 99 * [n] * n }}", "template: a product of more than 16000000 characters"),
    ],
)
def test_a_giant_prompt_is_an_error_row(tmp_path: Path, template: str, said: str) -> None:
    data = read_one(tmp_path, {"template": template}, n=[1_000_000])
    assert said in str(data.rows[0].error)


@pytest.mark.slow
def test_formats_and_products_of_a_sensible_size(tmp_path: Path) -> None:
    section = {"template": "{{ '%*d of %d%%' | format(5, n, n) }}{{ '=' * 3 }}{{ n * n }}{{ '%d' % n }}"}
    data = read_one(tmp_path, section, n=[10**9])
    assert data.rows[0].prompt == "1000000000 of 1000000000%===1000000000000000000" + "1000000000"


@pytest.mark.slow
def test_a_cell_that_python_cannot_hold_costs_its_row_alone(tmp_path: Path) -> None:
    when = pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("ms"), safe=False)
    data = read_one(tmp_path, {"template": "{{ when.year }}"}, when=when)
    assert data.rows[0].prompt == "1970"
    assert "column 'when' holds a value that cannot be read" in str(data.rows[1].error)


def test_a_file_changed_since_planning(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", prompt=prompts(5))
    job = make_job(file, tmp_path / "out")
    (unit,) = plan_of(job).units
    write(file, prompt=prompts(50))
    with pytest.raises(InputError, match=r"a\.parquet has changed since the job was planned \(\d+ bytes, "):
        reader_of(job).read(unit)
    plain = one_piece(unit.id, str(file), "a.parquet", 45, 10)
    with pytest.raises(InputError, match="it has 50 rows, the plan reads up to row 54"):
        reader_of(job).read(plain)
    file.unlink()
    with pytest.raises(InputError, match="is gone"):
        reader_of(job).read(unit)


def test_a_file_rewritten_to_the_same_size_is_a_changed_file(tmp_path: Path) -> None:
    """The change is noticed before the file is opened, and also between two units of the file."""
    old, new = (write(tmp_path / f"{word}.parquet", prompt=[f"{word} {i:04}" for i in range(200)]) for word in "ab")
    file = tmp_path / "in/a.parquet"
    file.parent.mkdir()
    file.write_bytes(old.read_bytes())
    job = make_job(file, tmp_path / "out", output={"rows_per_file": 100})
    first, second = plan_of(job).units
    reader = reader_of(job)
    assert reader.read(first).rows[0].prompt == "a 0000"
    assert old.stat().st_size == new.stat().st_size
    before = file.stat()
    file.write_bytes(new.read_bytes())
    # the file system's clock has steps of a few milliseconds, and both writes may have been in the same step
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    for unit in (second, first):
        with pytest.raises(InputError, match="has changed since the job was planned"):
            reader.read(unit)


def test_a_corrupt_page_names_file_and_rows_and_the_next_file_works(tmp_path: Path) -> None:
    rows = prompts(3000)
    file = write(tmp_path / "in/a.parquet", prompt=rows, group=1000)
    good = write(tmp_path / "in/b.parquet", prompt=prompts(2))
    offset = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 200] = bytes(200)
    file.write_bytes(bytes(data))
    reader = reader_of(make_job(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(InputError, match=r"a\.parquet, rows 1000 to 1999: cannot be decoded"):
        reader.read(one_piece("u", str(file), "a.parquet", 1000, 1000))
    assert len(reader.read(one_piece("u", str(file), "a.parquet", 2000, 1000)).rows) == 1000
    assert len(reader.read(one_piece("u", str(good), "b.parquet", 0, 2)).rows) == 2


def test_a_storage_failure_is_not_taken_for_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a remote read fails for good, pyarrow passes on the StorageError as it is. The next attempt works."""
    file = write(tmp_path / "a.parquet", prompt=prompts(3))
    remote = Storage("memory://inputs")
    remote.write("a.parquet", file.read_bytes())
    job = make_job("memory://inputs/a.parquet", tmp_path / "out")
    (unit,) = plan_of(job).units
    reader = reader_of(job)

    def failing(*_: Any) -> bytes:
        raise StorageError("cannot read: reset by peer (tried 5 times)")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read_range", failing)
        with pytest.raises(StorageError, match="tried 5 times"):
            reader.read(unit)
    assert [row.prompt for row in reader.read(unit).rows] == prompts(3)
    remote.remove("a.parquet")


MEMORY_PROBE = """
import sys
from pathlib import Path
from pipeline.planning.plan import make_plan
from tests.pipeline.cases import make_job, reader_of

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

job = make_job(sys.argv[1], sys.argv[2])
before = resident_mib()
plan = make_plan(job, checkpoint_identity="x")
planned = resident_mib()
reader, rows, early, peak = reader_of(job), 0, 0.0, 0.0
for number, unit in enumerate(plan.units):
    rows += len(reader.read(unit).rows)
    peak = max(peak, resident_mib())
    if number == 9:
        early = peak
print(rows, planned - before, early - planned, peak - early)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The file has 2 million rows in one row group, 130 MB of text. Planning adds under 30 MiB, and reading all 200
    units under 90 MiB; of these, the last 190 units add under 30 MiB to what the first 10 took."""
    rows = 2_000_000
    numbers = pa.array(range(rows))
    text = pa.compute.binary_join_element_wise(  # type: ignore[call-overload]  # its types know no plain strings
        numbers.cast(pa.string()), "a prompt of some fifty characters, more or less", " "
    )
    file = tmp_path / "giant.parquet"
    pq.write_table(pa.table({"prompt": text}), file, row_group_size=rows, use_dictionary=False)
    assert pq.read_metadata(file).num_row_groups == 1
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(file), str(tmp_path / "out")],
        cwd=ROOT,
        env=memory.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    read, planning, first, later = map(float, run.stdout.split())
    print(f"planning {planning:.1f} MiB, first units {first:.1f} MiB, all later units {later:.1f} MiB")
    assert read == rows
    assert planning < 30
    assert first + later < 90
    assert later < 30
