"""Tests of planning: units cover every row once, only footers are read, and unusable input is refused in one clear
line."""

import dataclasses
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.job import Job
from pipeline.core.errors import InputError
from pipeline.planning import fingerprint
from pipeline.planning.packing import StoredUnits, cut, spans_of, unit_id
from pipeline.planning.plan import make_plan
from pipeline.planning.prompts import Begun
from tests.pipeline.cases import CHECKPOINT, make_job, plan_of, prompts, run, write

GROUPS = st.lists(st.integers(0, 60), max_size=30)
LIMIT = st.integers(1, 50)


@given(groups=GROUPS, limit=LIMIT)
def test_units_cover_every_row_once_and_keep_the_limit(groups: list[int], limit: int) -> None:
    row = 0
    for first, count in cut(groups, limit):
        assert first == row
        assert 1 <= count <= limit
        row += count
    assert row == sum(groups)


@given(groups=GROUPS, limit=LIMIT)
def test_units_end_at_row_group_borders_where_possible(groups: list[int], limit: int) -> None:
    borders = {sum(groups[:i]) for i in range(len(groups) + 1)}
    inside_big = {
        row for i, rows in enumerate(groups) if rows > limit for row in range(sum(groups[:i]) + 1, sum(groups[: i + 1]))
    }
    for first, count in cut(groups, limit):
        assert first + count in borders | inside_big


@given(groups=st.lists(st.integers(1, 10), min_size=1, max_size=30), limit=st.integers(10, 50))
def test_small_groups_are_put_together(groups: list[int], limit: int) -> None:
    """No two neighbours could have been one unit, so that many small groups make files of a sensible size."""
    units = list(cut(groups, limit))
    for (_, count), (first, _) in itertools.pairwise(units):
        following = groups[[sum(groups[:i]) for i in range(len(groups))].index(first)]
        assert count + following > limit


def test_a_giant_group_is_cut_into_even_pieces() -> None:
    assert list(cut([10_001], 10_000)) == [(0, 5000), (5000, 5001)]


def test_unit_ids_depend_on_name_and_row_alone() -> None:
    digest = hashlib.sha256(b"a/b.parquet").hexdigest()[:12]
    assert unit_id("a/b.parquet", 30) == f"{digest}-0000000030"
    assert unit_id("a.parquet", 0) != unit_id("b.parquet", 0)
    assert unit_id("a.parquet", 7).endswith("-0000000007")


def test_a_plan_of_a_folder(tmp_path: Path) -> None:
    """Files below the folder are found in the order of their names. Hidden files, other kinds and empty files give no
    unit."""
    write(tmp_path / "in/b.parquet", prompt=prompts(5), group=2)
    write(tmp_path / "in/sub/a b#1.parquet", prompt=prompts(3))
    write(tmp_path / "in/none.parquet", prompt=pa.array([], pa.string()))
    write(tmp_path / "in/_old/c.parquet", prompt=prompts(9))
    write(tmp_path / "in/.d.parquet", prompt=prompts(9))
    (tmp_path / "in/notes.txt").write_text("x")
    plan = plan_of(make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 4}))
    assert [(f.name, f.rows) for f in plan.files] == [("b.parquet", 5), ("none.parquet", 0), ("sub/a b#1.parquet", 3)]
    assert [spans_of(unit) for unit in plan.units] == [
        (("b.parquet", 0, 4),),
        (("b.parquet", 4, 1),),
        (("sub/a b#1.parquet", 0, 3),),
    ]
    assert plan.rows == 8
    assert len({unit.id for unit in plan.units}) == 3
    assert Path(plan.units[2].pieces[0].file).exists()


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    """No row is left out because its file lies elsewhere; a folder that links to its parent is read once."""
    write(tmp_path / "store/x/a.parquet", prompt=prompts(2))
    write(tmp_path / "store/b.parquet", prompt=prompts(3))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.parquet").symlink_to(tmp_path / "store/x/a.parquet")
    (tmp_path / "in/more").symlink_to(tmp_path / "store")
    (tmp_path / "store/loop").symlink_to(tmp_path / "store")
    (tmp_path / "store/x/back").symlink_to(tmp_path / "in")
    found = ["a.parquet", "more/b.parquet", "more/x/a.parquet"]
    for path in (tmp_path / "in", f"file://{tmp_path}/in", tmp_path / "in/**/*.parquet"):
        plan, _, _ = run(make_job(path, tmp_path / f"out-{len(str(path))}"))
        assert [file.name for file in plan.files] == found
        assert plan.rows == 7
    assert plan_of(make_job(tmp_path / "in/*.parquet", tmp_path / "out")).rows == 2


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(2))
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "absent")
    for path in ("in", "in/*.parquet"):
        message = refusal(make_job(tmp_path / path, tmp_path / "out"))
        assert "b.parquet is a link that leads to nothing" in message
    assert "b.parquet does not exist" in refusal(make_job(tmp_path / "in/b.parquet", tmp_path / "out"))


def test_a_pipe_is_no_empty_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is a pipe or a device" in refusal(make_job(tmp_path / "pipe", tmp_path / "out"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(2)).rename(os.fsdecode(os.fsencode(tmp_path) + b"/in/\xff.parquet"))
    assert r"\udcff.parquet is a name that is not UTF-8" in refusal(make_job(tmp_path / "in", tmp_path / "out"))
    column = write(tmp_path / "b/a.parquet", prompt=prompts(2), other=prompts(2))
    column.write_bytes(column.read_bytes().replace(b"other", b"oth\xffr"))
    assert "a.parquet: has a column name that is not UTF-8" in refusal(make_job(tmp_path / "b", tmp_path / "out"))


def test_one_file_and_globs(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1"):
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(2))
    write(tmp_path / "in/deep/a3.parquet", prompt=prompts(2))
    write(tmp_path / "in/x[1].parquet", prompt=prompts(2))

    def names(path: str) -> list[str]:
        return [file.name for file in plan_of(make_job(tmp_path / path, tmp_path / "out")).files]

    assert names("in/a1.parquet") == ["a1.parquet"]
    assert names("in/a*.parquet") == ["a1.parquet", "a2.parquet"]
    assert names("in/**/a*.parquet") == ["a1.parquet", "a2.parquet", "deep/a3.parquet"]
    assert names("in/x[1].parquet") == ["x[1].parquet"]


def test_the_same_file_gives_the_same_units_from_anywhere(tmp_path: Path) -> None:
    """Row keys hold relative names, so moving the input does not change the completions."""
    for root in ("here", "there"):
        write(tmp_path / root / "a.parquet", prompt=prompts(4))
    ids = [
        [(u.id, spans_of(u)) for u in plan_of(make_job(tmp_path / root, tmp_path / "out")).units]
        for root in ("here", "there")
    ]
    assert ids[0] == ids[1]


def refusal(job: Job) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(job)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/prompts.csv").write_text("a")
    assert "does not exist" in refusal(make_job(tmp_path / "absent", tmp_path / "out"))
    assert "does not exist" in refusal(make_job(tmp_path / "absent/deeper.parquet", tmp_path / "out"))
    assert "it is empty" in refusal(make_job(tmp_path / "empty", tmp_path / "out"))
    assert "it has prompts.csv" in refusal(make_job(tmp_path / "other", tmp_path / "out"))
    assert "matches no file" in refusal(make_job(tmp_path / "other/*.parquet", tmp_path / "out"))


def test_unknown_protocol_is_one_line(tmp_path: Path) -> None:
    from pipeline.core.errors import StorageError

    with pytest.raises(StorageError, match="nosuch://x/y"):
        plan_of(make_job("nosuch://user:pw@x/y", tmp_path / "out"))


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=pa.array([], pa.string()))
    assert "has no rows" in refusal(make_job(tmp_path / "in", tmp_path / "out"))


def test_files_that_are_not_parquet_are_all_counted(tmp_path: Path) -> None:
    good = write(tmp_path / "in/good.parquet", prompt=prompts(3))
    (tmp_path / "in/text.parquet").write_text("prompt\nhello\n" * 10)
    (tmp_path / "in/zero.parquet").write_bytes(b"")
    (tmp_path / "in/cut.parquet").write_bytes(good.read_bytes()[:-9])
    (tmp_path / "in/wreck.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    job = make_job(tmp_path / "in", tmp_path / "out")
    message = refusal(job)
    assert "4 of 5 files cannot be read" in message
    assert "cut.parquet: is not Parquet" in message
    assert "and 1 more" in message
    plan = make_plan(job, checkpoint_identity=CHECKPOINT, allow_unreadable=True)
    assert plan.rows == 3
    assert {name for name, _ in plan.unreadable} == {"text.parquet", "zero.parquet", "cut.parquet", "wreck.parquet"}
    assert dict(plan.unreadable)["zero.parquet"] == "is empty (0 bytes)"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {},
            "a.parquet: no column 'prompt' (input.prompt_column): set input.prompt_column, input.template or "
            "input.messages_column; its columns: text, n, tags, when",
        ),
        (
            {"prompt_column": "n"},
            "prompt column 'n' is int64: it must hold strings or bytes; input.template can print it, as {{ n }} does",
        ),
        ({"prompt_column": "tags"}, "prompt column 'tags' is list<"),
        ({"template": "{{ text }} {{ title }}"}, "the template reads column 'title', which is not there"),
        (
            {"prompt_column": "text", "id_column": "when"},
            "id column 'when' is double: it must hold integers, strings or bytes",
        ),
        ({"prompt_column": "text", "id_column": "key"}, "no column 'key' (input.id_column)"),
        ({"prompt_column": "text", "carry": ["key"]}, "no column 'key' (input.carry)"),
        ({"prompt_column": "text", "row_settings": {"seed": "s"}}, "no column 's' (input.row_settings.seed)"),
        (
            {"prompt_column": "text", "row_settings": {"seed": "when"}},
            "a.parquet: seed column 'when' is double: it must be an integer column",
        ),
        ({"prompt_column": "text", "carry": ["n", "n"]}, "column 'n' is carried twice"),
        ({"prompt_column": "text", "carry": ["Latency_S"]}, "would collide with the output's own column latency_s"),
        ({"prompt_column": "text", "carry": ["id"]}, "would collide with the output's own column id"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    write(tmp_path / "in/a.parquet", text=["x"], n=[1], tags=[["t"]], when=[0.5])
    assert said in refusal(make_job(tmp_path / "in", tmp_path / "out", input=settings))


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "column 'prompt' is in the file 2 times" in refusal(make_job(tmp_path / "a.parquet", tmp_path / "out"))


def test_types_that_differ_between_files_name_both(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"], n=[1])
    write(tmp_path / "in/b.parquet", prompt=["x"], n=["1"])
    message = refusal(make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["n"]}))
    assert "column 'n' is int64 in a.parquet but string in b.parquet" in message


def test_a_column_that_is_all_null_in_one_file_takes_its_type_from_the_others(tmp_path: Path) -> None:
    """Writers such as pandas leave such a column without a type."""
    write(tmp_path / "in/a.parquet", prompt=["x"], n=pa.nulls(1), never=pa.nulls(1))
    write(tmp_path / "in/b.parquet", prompt=["x"], n=[1], never=pa.nulls(1))
    plan, _, _ = run(make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["n", "never"]}))
    assert (plan.schema.field("n").type, plan.schema.field("never").type) == (pa.int64(), pa.null())
    parts = pq.read_table(tmp_path / "out", columns=["source_file", "n"])
    assert sorted(parts.to_pylist(), key=str) == [
        {"source_file": "a.parquet", "n": None},
        {"source_file": "b.parquet", "n": 1},
    ]


def test_a_prompt_or_id_column_that_is_all_null_in_one_file(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=pa.nulls(2), key=pa.nulls(2))
    write(tmp_path / "in/b.parquet", prompt=["x"], key=[7])
    job = make_job(tmp_path / "in", tmp_path / "out", input={"id_column": "key"})
    plan, _, _ = run(job)
    assert plan.schema.field("id").type == pa.int64()
    parts = pq.read_table(tmp_path / "out", columns=["id", "error"]).to_pylist()
    assert sorted(parts, key=str) == [{"id": 7, "error": None}, *[{"id": None, "error": "prompt is null"}] * 2]
    alone = make_job(tmp_path / "in/a.parquet", tmp_path / "new")
    assert "prompt column 'prompt' is null in every file" in refusal(alone)
    write(tmp_path / "in/a.parquet", prompt=["x"], key=pa.nulls(1))
    alone = make_job(tmp_path / "in/a.parquet", tmp_path / "new", input={"id_column": "key"})
    assert "id column 'key' is null in every file" in refusal(alone)


NESTED: dict[str, tuple[list[pa.DataType], pa.DataType, list[object]]] = {
    "list": (
        [
            pa.list_(pa.string()),
            pa.large_list(pa.large_string()),
            pa.list_(pa.field("item", pa.string(), nullable=False)),
            pa.list_view(pa.string()),
        ],
        pa.list_(pa.string()),
        [["x"], []],
    ),
    "struct": (
        [pa.struct([("a", pa.null())]), pa.struct([("a", pa.string())]), pa.struct([("a", pa.large_string())])],
        pa.struct([("a", pa.string())]),
        [{"a": None}, None],
    ),
    "map": (
        [pa.map_(pa.string(), pa.large_string()), pa.map_(pa.large_string(), pa.string())],
        pa.map_(pa.string(), pa.string()),
        [[("k", "v")], []],
    ),
    "list of struct": (
        [pa.list_(pa.struct([("a", pa.list_(pa.null()))])), pa.list_(pa.struct([("a", pa.list_(pa.int8()))]))],
        pa.list_(pa.struct([("a", pa.list_(pa.int8()))])),
        [[{"a": []}], None],
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_types_that_differ_in_encoding_or_null_parts_are_one(tmp_path: Path, name: str) -> None:
    kinds, expected, values = NESTED[name]
    for number, kind in enumerate(kinds):
        write(tmp_path / f"in/{number}.parquet", prompt=["x", "y"], nested=pa.array(values, kind))
    plan, _, _ = run(make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["nested"]}))
    assert plan.schema.field("nested").type == expected
    for file in (tmp_path / "out").glob("*.parquet"):
        assert pq.read_schema(file).field("nested").type == expected
        assert pq.read_table(file)["nested"].to_pylist() == values * len(kinds)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_string_type_is_a_prompt_and_an_id(tmp_path: Path, kind: pa.DataType) -> None:
    """Files of different writers are one input: the encoding of strings makes no difference."""
    write(tmp_path / "in/a.parquet", prompt=pa.array(["x"], pa.string()), key=pa.array(["1"], pa.string()))
    column = pa.array(["x", "y"]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(["x", "y"], kind)
    write(tmp_path / "in/b.parquet", prompt=column, key=column)
    plan = plan_of(make_job(tmp_path / "in", tmp_path / "out", input={"id_column": "key"}))
    assert plan.rows == 3
    assert plan.schema.field("id").type == pa.string()


def test_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    """Otherwise the parts of one run would be the input of the next."""
    write(tmp_path / "in/a.parquet", prompt=["x"])
    assert "lies inside input" in refusal(make_job(tmp_path / "in", tmp_path / "in/out"))
    assert "lies inside input" in refusal(make_job(tmp_path / "in", tmp_path / "in"))
    assert "lies inside input" in refusal(make_job(tmp_path / "in/*.parquet", tmp_path / "in"))
    assert "lies inside input" in refusal(make_job(tmp_path / "in/**/*.parquet", tmp_path / "in/out"))
    assert plan_of(make_job(tmp_path / "in/a.parquet", tmp_path / "in")).rows == 1
    assert plan_of(make_job(tmp_path / "in/*.parquet", tmp_path / "in/out")).rows == 1
    assert plan_of(make_job(tmp_path / "in", tmp_path / "in-out")).rows == 1
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert "lies inside input" in refusal(make_job(tmp_path / "link", tmp_path / "in/out"))
    assert "lies inside input" in refusal(make_job(tmp_path / "in", tmp_path / "link/out"))
    assert "lies inside input" in refusal(make_job(tmp_path / "in", f"file://{tmp_path}/in/out"))
    assert "lies inside input" in refusal(make_job(f"file://{tmp_path}/in/*.parquet", tmp_path / "link"))
    assert plan_of(make_job(tmp_path / "link/*.parquet", tmp_path / "in/out")).rows == 1


CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "generation.seed": {"generation": {"seed": 5}},
    "generation.mode": {"generation": {"mode": "ar"}},
    "generation.stop": {"generation": {"stop": ["x"]}},
    "generation.on_degenerate": {"generation": {"on_degenerate": "retry"}},
    "generation.eos_ids": {"generation": {"eos_ids": []}},
    "model.dtype": {"model": {"dtype": "bfloat16"}},
    "output.rows_per_file": {"output": {"rows_per_file": 3}},
    "output columns": {"output": {"keep_prompt": True}},
    "input.carry": {"input": {"carry": ["n"]}},
    "input.row_settings": {"input": {"row_settings": {"seed": "n"}}},
    "input.id_column": {"input": {"id_column": "n"}},
    "input.prompt_column": {"input": {"prompt_column": "text"}},
    "input.template": {"input": {"template": "{{ prompt }}"}},
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_the_output_changes_the_fingerprint(tmp_path: Path, field: str) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"], text=["y"], n=[1])
    before = plan_of(make_job(tmp_path / "in", tmp_path / "out")).fingerprint
    after = plan_of(make_job(tmp_path / "in", tmp_path / "out", **CHANGES[field])).fingerprint
    assert before.digest != after.digest
    changed = {name for name in before.fields if before.fields[name] != after.fields[name]}
    with_it = {
        "input.template": "input.prompt_column",
        "input.carry": "output columns",
        "input.id_column": "output columns",
    }
    assert changed == {field, with_it.get(field, field)}


def test_what_does_not_change_the_output_leaves_the_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"])
    before = plan_of(make_job(tmp_path / "in", tmp_path / "out"))
    after = plan_of(
        make_job(
            tmp_path / "in",
            tmp_path / "elsewhere",
            engine={"max_rows": 3},
            workers={"replicas": 7, "gpus": 0},
            retry={"attempts": 9},
            input={"on_change": "extend"},
        )
    )
    assert before.fingerprint == after.fingerprint


def test_a_job_of_today_has_the_fingerprint_fields_of_older_outputs(tmp_path: Path) -> None:
    """A name that is added or lost here would refuse every output that an older version began. The rules of prompts
    and of units have versions of their own; a job whose output was begun before has the fields without them."""
    write(tmp_path / "in/a.parquet", prompt=["x"])
    job = make_job(tmp_path / "in", tmp_path / "out")
    new = plan_of(job).fingerprint.fields
    old = make_plan(job, checkpoint_identity=CHECKPOINT, begun=Begun(1), stored=StoredUnits(1)).fingerprint.fields
    assert new == {**old, "prompts": 2, "work units": 2}
    assert old.keys() == {
        *("input.prompt_column", "input.template", "input.id_column", "input.carry", "input.row_settings"),
        *("output.rows_per_file", "output columns", "output schema version", "model.checkpoint", "model.dtype"),
        *("generation.mode", "generation.max_new_tokens", "generation.block_size", "generation.steps_per_block"),
        *("generation.confidence_threshold", "generation.temperature", "generation.top_k", "generation.top_p"),
        *("generation.seed", "generation.eos_ids", "generation.stop", "generation.on_degenerate"),
    }


def test_a_later_setting_of_generation_enters_the_fingerprint_unless_it_has_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seed` stands for a setting that the first versions did not have."""
    monkeypatch.setattr(fingerprint, "FIRST_SETTINGS", fingerprint.FIRST_SETTINGS - {"seed"})
    write(tmp_path / "in/a.parquet", prompt=["x"])
    usual, other = (
        plan_of(make_job(tmp_path / "in", tmp_path / "out", generation={"seed": seed})).fingerprint.fields
        for seed in (0, 5)
    )
    assert "generation.seed" not in usual
    assert other["generation.seed"] == 5


def test_the_checkpoint_and_the_columns_are_part_of_the_fingerprint_and_the_files_are_not(tmp_path: Path) -> None:
    """The completion of a row does not depend on the other files. A change of the files is found by their listing."""
    write(tmp_path / "in/a.parquet", prompt=["x"], n=[1])
    job = make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["n"]})
    before = plan_of(job)
    assert make_plan(job, checkpoint_identity="another").fingerprint.digest != before.fingerprint.digest
    write(tmp_path / "in/b.parquet", prompt=["y"], n=[2])
    assert plan_of(job).fingerprint == before.fingerprint
    assert plan_of(job).listing.keys() - before.listing.keys() == {"b.parquet"}
    for name in "ab":
        write(tmp_path / f"in/{name}.parquet", prompt=["y"], n=["2"])
    after = plan_of(job).fingerprint
    assert after.fields["output columns"] == {"id": "string", "n": "string"}
    assert after.digest != before.fingerprint.digest


def test_files_of_rays_package_are_known_by_content(tmp_path: Path) -> None:
    """Ray unpacks the working directory with new times at each start, and a job must still resume."""
    folder = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    file = write(folder / "a.parquet", prompt=["x"])
    job = make_job(file, tmp_path / "out")
    before = plan_of(job)
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    assert plan_of(job).listing == before.listing
    assert before.files[0].stamp.startswith("sha256:")


def test_a_plan_is_frozen(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of(make_job(tmp_path / "in", tmp_path / "out")).rows = 3  # type: ignore[misc]
