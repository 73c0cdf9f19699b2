"""Tests of settings in columns of the input: which columns can hold them, what each cell means, and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import RequestError
from model.requests import GenerationParams
from pipeline.config.job import Job
from pipeline.config.loader import load_job
from pipeline.core.errors import InputError, JobError
from pipeline.core.types import Row
from pipeline.input.row_settings import misfit, read_settings, with_settings
from pipeline.maintenance.retry_errors import make_retry_job
from pipeline.maintenance.verify import verify
from tests.pipeline.cases import make_job, not_utf8, plan_of, reader_of, run, write

TEXT, WHOLE, NUMBER = pa.string(), pa.int16(), pa.float32()
INTEGERS = [getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
LISTS = [
    *(make(kind) for make in (pa.list_, pa.large_list, pa.list_view) for kind in TEXTS),
    pa.list_(TEXT, 2),
    pa.list_(pa.null()),
]
NEVER = [pa.bool_(), pa.decimal128(5, 2), pa.timestamp("s"), pa.binary(), pa.struct([("x", WHOLE)]), pa.list_(WHOLE)]
FITTING = {
    "max_new_tokens": INTEGERS,
    "seed": INTEGERS,
    "temperature": [*INTEGERS, *FLOATS],
    "confidence_threshold": [*INTEGERS, *FLOATS],
    "stop": [*TEXTS, *LISTS],
}
ALL = [*INTEGERS, *FLOATS, *TEXTS, *LISTS, *NEVER]


@pytest.mark.parametrize("setting", FITTING)
def test_a_column_fits_or_is_told_what_would(setting: str) -> None:
    for kind in ALL:
        needed = misfit(setting, kind)
        assert (needed is None) == (kind in FITTING[setting]), kind
        assert needed is None or needed.startswith(("a string column or", "an integer"))


def rows_of(tmp_path: Path, columns: dict[str, Any], **settings: str) -> list[Row]:
    """Write a file with these columns and return its rows, with the settings taken from the named columns."""
    count = len(next(iter(columns.values())))
    write(tmp_path / "in/a.parquet", prompt=[f"p{i}" for i in range(count)], **columns)
    job = make_job(tmp_path / "in", tmp_path / "out", input={"row_settings": settings})
    reader = reader_of(job)
    (unit,) = plan_of(job).units
    rows = reader.read(unit).rows
    reader.close()
    return rows


def values(rows: list[Row]) -> list[dict[str, Any]]:
    return [{setting.name: setting.value for setting in row.settings} for row in rows]


def test_a_cell_replaces_the_jobs_value_and_null_leaves_it(tmp_path: Path) -> None:
    columns = {
        "n": pa.array([5, None, 7], pa.uint8()),
        "t": pa.array([0.5, None, None], pa.float16()),
        "s": pa.array([[], ["a", "b"], None], pa.list_(TEXT)),
    }
    rows = rows_of(tmp_path, columns, max_new_tokens="n", temperature="t", stop="s")
    assert values(rows) == [
        {"max_new_tokens": 5, "temperature": 0.5, "stop": ()},
        {"stop": ("a", "b")},
        {"max_new_tokens": 7},
    ]
    job = GenerationParams(max_new_tokens=99, stop=("END",), seed=3)
    params = [with_settings(job, row.settings) for row in rows]
    assert [one.max_new_tokens for one in params] == [5, 99, 7]
    assert [one.stop for one in params] == [(), ("a", "b"), ("END",)]
    assert {one.seed for one in params} == {3}
    assert with_settings(job, ()) is job


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS], ids=str)
def test_numbers_come_in_any_type(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"n": pa.array([1, 0], pa.int64()).cast(kind)}
    assert values(rows_of(tmp_path, columns, temperature="n")) == [{"temperature": 1}, {"temperature": 0}]


@pytest.mark.parametrize("kind", [*TEXTS, *LISTS], ids=str)
def test_stop_strings_come_in_any_type(tmp_path: Path, kind: pa.DataType) -> None:
    column: pa.Array[Any]
    said: tuple[str, ...]
    if kind in TEXTS:
        column, said = pa.array(["ab", None]).cast(kind), ("ab",)
    elif kind == pa.list_(pa.null()):
        column, said = pa.array([[], None], kind), ()
    else:
        column, said = pa.array([["ab", "c"], None], kind), ("ab", "c")
    assert values(rows_of(tmp_path, {"s": column}, stop="s")) == [{"stop": said}, {}]


WRONG: list[tuple[str, "pa.Array[Any]", str]] = [
    ("max_new_tokens", pa.array([0]), "column 'c': max_new_tokens is 0: it must be a whole number of at least 1"),
    ("max_new_tokens", pa.array([-3], pa.int8()), "column 'c': max_new_tokens is -3: it must be a whole number"),
    ("max_new_tokens", pa.array([2**31]), "column 'c': max_new_tokens is 2147483648: it must be a whole number"),
    (
        "seed",
        pa.array([2**63], pa.uint64()),
        "column 'c': seed is 9223372036854775808: it must be a whole number from 0",
    ),
    ("temperature", pa.array([float("nan")]), "column 'c': temperature is nan: it must be a number from 0"),
    ("temperature", pa.array([float("inf")]), "column 'c': temperature is inf: it must be a number from 0"),
    ("temperature", pa.array([-0.5]), "column 'c': temperature is -0.5: it must be a number from 0"),
    (
        "confidence_threshold",
        pa.array([1.5]),
        "column 'c': confidence_threshold is 1.5: it must be a number from 0 to 1",
    ),
    ("confidence_threshold", pa.array([2]), "column 'c': confidence_threshold is 2: it must be a number from 0 to 1"),
    ("stop", pa.array([""]), "column 'c': stop is ('',): it must be strings that are not empty"),
    ("stop", pa.array([["a", None]]), "column 'c': stop is ('a', None): it must be strings that are not empty"),
    ("stop", not_utf8(b"\xff"), "column 'c' holds bytes that are not UTF-8 (byte 0)"),
    (
        "stop",
        pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), not_utf8(b"a", b"\xff")),
        "column 'c' holds bytes that are not UTF-8 (byte 0)",
    ),
    ("stop", pa.array(["x" * 5000]), "column 'c': stop has a string of 5000 characters: at most 4096 are allowed"),
    ("stop", pa.array([["x"] * 300]), "column 'c': stop has more than 256 strings: give fewer"),
]


@pytest.mark.parametrize(("setting", "column", "said"), WRONG)
def test_a_wrong_value_costs_its_row_alone(tmp_path: Path, setting: str, column: "pa.Array[Any]", said: str) -> None:
    good: dict[str, Any] = {"stop": "END"}
    cell = good.get(setting, 1)
    fine = pa.array([[cell] if pa.types.is_list(column.type) else cell], column.type)
    bad, rest = rows_of(tmp_path, {"c": pa.concat_arrays([column, fine])}, **{setting: "c"})
    assert bad.error is not None
    assert bad.error.startswith(said)
    assert (bad.prompt, bad.settings) == (None, ())
    assert (rest.error, rest.prompt) == (None, "p1")
    assert [one.name for one in rest.settings] == [setting]


def test_the_first_wrong_cell_of_a_row_is_named_and_a_prompt_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x", None], n=[-1, -1], t=[-1.0, -1.0])
    job = make_job(tmp_path / "in", tmp_path / "out", input={"row_settings": {"temperature": "t", "seed": "n"}})
    (unit,) = plan_of(job).units
    errors = [row.error for row in reader_of(job).read(unit).rows]
    assert errors[0] is not None
    assert errors[0].startswith("column 't'")
    assert errors[1] == "prompt is null"


def test_a_million_stop_strings_are_never_python_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few KB of Parquet can hold any number of stop strings, so at most 257 of a row become Python strings."""
    million = pa.ListArray.from_arrays(pa.array([0, 1_000_000, 1_000_001], pa.int32()), pa.array(["x"] * 1_000_001))
    seen: list[int] = []
    check = GenerationParams.__post_init__

    def count(params: GenerationParams) -> None:
        seen.append(len(params.stop))
        check(params)

    monkeypatch.setattr(GenerationParams, "__post_init__", count)
    (none, wrong), (settings, right) = read_settings(pa.table({"s": million}), {"stop": "s"})
    assert seen == [257, 1]
    assert (none, wrong) == ((), "column 's': stop has more than 256 strings: give fewer")
    assert (settings[0].value, right) == (("x",), None)


CELLS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "max_new_tokens": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "seed": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "temperature": (pa.float64(), st.floats()),
    "confidence_threshold": (pa.float64(), st.floats(-0.5, 1.5)),
    "stop": (pa.list_(TEXT), st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=3), max_size=3)),
}


@pytest.mark.slow
@given(
    rows=st.lists(st.fixed_dictionaries({name: st.none() | cells for name, (_, cells) in CELLS.items()}), min_size=1)
)
def test_whatever_the_cells_hold_a_row_gets_settings_or_a_reason(rows: list[dict[str, Any]]) -> None:
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, (kind, _) in CELLS.items()})
    for row, (settings, wrong) in zip(rows, read_settings(table, {name: name for name in CELLS}), strict=True):
        own = {name: value for name, value in row.items() if value is not None}
        try:
            expected = GenerationParams(**own)
        except RequestError:
            assert wrong is not None
            assert wrong.startswith("column '")
        else:
            assert wrong is None
            assert with_settings(GenerationParams(), settings) == expected


def test_rows_with_the_same_settings_share_them(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"s": [["a", "b"], ["b"]] * 50, "n": [1, 2] * 50}, stop="s", seed="n")
    assert len({id(row.settings) for row in rows}) == 2


def test_one_column_may_have_several_roles(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x", "y"], n=[3, 4])
    settings = {"seed": "n", "temperature": "n", "stop": "prompt"}
    section = {"id_column": "n", "carry": ["n", "prompt"], "row_settings": settings}
    job = make_job(tmp_path / "in", tmp_path / "out", input=section)
    (unit,) = plan_of(job).units
    data = reader_of(job).read(unit)
    assert [row.prompt for row in data.rows] == ["x", "y"]
    assert values(data.rows) == [
        {"temperature": 3, "seed": 3, "stop": ("x",)},
        {"temperature": 4, "seed": 4, "stop": ("y",)},
    ]
    assert data.columns.to_pylist() == [{"id": 3, "n": 3, "prompt": "x"}, {"id": 4, "n": 4, "prompt": "y"}]


def test_files_agree_on_a_column_or_leave_it_null(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"], n=pa.nulls(1), s=pa.nulls(1))
    write(tmp_path / "in/b.parquet", prompt=["x"], n=[5], s=pa.nulls(1))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"row_settings": {"seed": "n", "stop": "s"}})
    reader = reader_of(job)
    assert [values(reader.read(unit).rows) for unit in plan_of(job).units] == [[{}, {"seed": 5}]]
    write(tmp_path / "in/c.parquet", prompt=["x"], n=pa.array([5], pa.int8()), s=pa.nulls(1))
    with pytest.raises(InputError, match=r"column 'n' is int64 in b.parquet but int8 in c.parquet: make them one type"):
        plan_of(job)
    write(tmp_path / "in/c.parquet", prompt=["x"], n=[5])
    with pytest.raises(
        InputError, match=r"c.parquet: no column 's' \(input.row_settings.stop\); its columns: prompt, n"
    ):
        plan_of(job)


JOB = "input: {{path: in.parquet, row_settings: {}}}\noutput: {{path: out}}\nmodel: {{checkpoint: builtin:noise}}\n"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "{top_k: k}",
            "input.row_settings.top_k is not a key of a job; known here: "
            "max_new_tokens, temperature, confidence_threshold, seed, stop",
        ),
        ("{seed: 5}", "input.row_settings.seed is 5: it must be text"),
        ("{seed: ''}", "input.row_settings.seed is '': it must not be empty"),
        ("[seed]", "input.row_settings is ['seed']: it must be a section"),
    ],
)
def test_faults_in_the_job_file(tmp_path: Path, section: str, said: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(section))
    with pytest.raises(JobError) as caught:
        load_job(file)
    assert said in str(caught.value)


def test_a_setting_can_be_named_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format("{seed: n}"))
    job = load_job(file, ["input.row_settings.stop=s"])
    assert job.input.row_settings.columns == {"seed": "n", "stop": "s"}


def test_rows_that_failed_keep_their_settings(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x", None, "z"], n=pa.array([-1, 5, 6], pa.int16()), rest=[1, 2, 3])
    job = make_job(tmp_path / "in", tmp_path / "out", input={"row_settings": {"seed": "n"}})
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    new: Job = load_job(made.job_file)
    assert new.input.row_settings == job.input.row_settings
    run(new)
    assert verify(new.output.path).problems == ()
    reader = reader_of(new)
    rows = [row for unit in plan_of(new).units for row in reader.read(unit).rows]
    assert [(row.error, values([row])) for row in rows] == [
        ("column 'n': seed is -1: it must be a whole number from 0 to 2**63 - 1", [{}]),
        ("prompt is null", [{"seed": 5}]),
    ]
