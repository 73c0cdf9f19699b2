"""Tests of planning many files: equal schemas are kept and checked once, and messages name the file concerned."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import InputError
from pipeline.input.files import list_input
from pipeline.planning import columns
from pipeline.planning.cost import chunks_of
from pipeline.planning.footers import distinct, read_footers
from pipeline.storage import parallel
from tests.pipeline.cases import make_job, plan_of, write

FILES, ODD = 60, 37


@pytest.fixture(params=["alone", "threads"], autouse=True)
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the footers in the calling thread, or in several."""
    monkeypatch.setattr(parallel, "LONG_CALL_S", float("inf"))
    monkeypatch.setattr(parallel, "FAILING_S", float("inf") if request.param == "alone" else -1.0)


def name_of(number: int) -> str:
    return f"{number // 20}/{number:03}.parquet"


def make_files(folder: Path, odd: dict[str, Any], **usual: Any) -> None:
    """Write FILES files with the `usual` columns. File ODD has the `odd` ones instead, and so has the last file."""
    for number in range(FILES):
        write(folder / "in" / name_of(number), **(odd if number in (ODD, FILES - 1) else usual))


def test_files_with_equal_columns_share_one_schema(tmp_path: Path) -> None:
    """Otherwise 100,000 files would hold 100,000 schemas. Writers such as pandas put other metadata into each file."""
    for number in range(FILES):
        table = pa.table({"prompt": ["x"], "n": [0.5 if number >= ODD else 1]})
        (file := tmp_path / "in" / name_of(number)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"pandas": f"rows {number}"}), file)
    root, listing = list_input(str(tmp_path / "in"))
    footers, unreadable = read_footers(root, listing, (), ("prompt",))
    assert not unreadable
    assert [info.name for info, _ in footers] == [name_of(number) for number in range(FILES)]
    assert [info.name for info, _ in distinct(footers)] == [name_of(0), name_of(ODD)]
    kinds = [footer.schema.field("n").type for _, footer in footers]
    assert kinds == [pa.int64()] * ODD + [pa.float64()] * (FILES - ODD)
    assert len({id(footer.schema) for _, footer in footers}) == 2


def test_columns_are_checked_once_for_each_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, {"n": [1], "prompt": ["x"]}, prompt=["x"], n=[1])
    looked: list[str] = []
    look: Callable[..., pa.DataType] = columns._column_type

    def counting(file: str, *rest: Any) -> pa.DataType:
        looked.append(file)
        return look(file, *rest)

    monkeypatch.setattr(columns, "_column_type", counting)
    assert plan_of(make_job(tmp_path / "in", tmp_path / "out")).rows == FILES
    assert looked == [name_of(0), name_of(ODD)]


@pytest.mark.parametrize(
    ("odd", "settings", "said"),
    [
        ({"prompt": [1], "n": [1]}, {}, f"{name_of(ODD)}: prompt column 'prompt' is int64: "),
        ({"n": [1]}, {}, f"{name_of(ODD)}: no column 'prompt' (input.prompt_column)"),
        (
            {"prompt": ["x"], "n": ["1"]},
            {"carry": ["n"]},
            f"column 'n' is int64 in {name_of(0)} but string in {name_of(ODD)}: ",
        ),
        ({"prompt": ["x"]}, {"template": "{{ prompt }}{{ n }}"}, f"{name_of(ODD)}: the template reads column 'n'"),
        (
            {"prompt": ["x"]},
            {"template": "{{ row }}"},
            f"column 'n' is not in both of {name_of(0)} and {name_of(ODD)}: ",
        ),
    ],
)
def test_the_first_file_that_differs_is_named(
    tmp_path: Path, odd: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    make_files(tmp_path, odd, prompt=["x"], n=[1])
    with pytest.raises(InputError) as caught:
        plan_of(make_job(tmp_path / "in", tmp_path / "out", input=settings))
    assert said in str(caught.value)


def test_the_file_that_gave_a_column_its_type_is_named(tmp_path: Path) -> None:
    """The files before it have only nulls in the column."""
    make_files(tmp_path, {"prompt": ["x"], "n": [1]}, prompt=["x"], n=pa.nulls(1))
    write(tmp_path / "in" / name_of(ODD + 5), prompt=["x"], n=["1"])
    with pytest.raises(InputError) as caught:
        plan_of(make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["n"]}))
    assert f"column 'n' is int64 in {name_of(ODD)} but string in {name_of(ODD + 5)}" in str(caught.value)


def test_unreadable_files_are_named_in_the_order_of_the_listing(tmp_path: Path) -> None:
    make_files(tmp_path, {"prompt": ["x"]}, prompt=["x"])
    for number in (ODD + 2, ODD, 5):
        (tmp_path / "in" / name_of(number)).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        plan_of(make_job(tmp_path / "in", tmp_path / "out"))
    named = "; ".join(f"{name_of(number)}: is empty (0 bytes)" for number in (5, ODD, ODD + 2))
    assert f"3 of {FILES} files cannot be read: {named}" in str(caught.value)


def test_a_row_group_with_fewer_columns_than_the_first_is_no_crash() -> None:
    """Only a broken footer has one; reading the file says what is wrong with it."""

    def group(names: str) -> SimpleNamespace:
        chunks = [SimpleNamespace(path_in_schema=name) for name in names]
        return SimpleNamespace(num_columns=len(chunks), column=chunks.__getitem__)

    groups = [group("abc"), group("ab")]
    metadata: Any = SimpleNamespace(num_row_groups=2, row_group=groups.__getitem__)
    assert [[chunk.path_in_schema for chunk in chunks] for chunks in chunks_of(metadata, ["c", "a"])] == [
        ["a", "c"],
        ["a"],
    ]
