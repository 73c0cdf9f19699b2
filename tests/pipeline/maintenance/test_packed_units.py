"""Tests of `verify`, `clean` and `retry-errors` over an output whose units have rows of several files."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.types import Piece, WorkUnit
from pipeline.maintenance import part_check
from pipeline.maintenance.clean import find_leftovers
from pipeline.maintenance.planned_units import sources
from pipeline.maintenance.retry_errors import make_retry_job
from pipeline.maintenance.verify import verify
from pipeline.output.layout import PLAN, part_name, record_name
from pipeline.output.part import result_table, to_parquet
from pipeline.output.records import RECORD_KEY, from_json, to_json
from pipeline.planning.packing import unit_id
from pipeline.planning.plan import Plan
from tests.pipeline.cases import (
    PACKED_ROWS,
    complete_row,
    open_ledger,
    packed_files,
    plan_by_old_rules,
    plan_of,
    publish,
    run,
    store_of,
    with_piece,
)
from tests.pipeline.maintenance.test_retry_errors import retried
from tests.pipeline.maintenance.test_verify import edit, rewrite, with_column

Fields = dict[str, Any]
ADVICE = (
    "put back the _job/plan.json that it was made with, or move _job/plan.json away and submit the job again, which "
    "makes the plan again from the parts"
)
"""What `verify` says about a part that is none of the plan's units: the part may be good, and the plan wrong."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Plan]:
    """Run the job once, for tests that damage a copy of its output."""
    job = packed_files(tmp_path_factory.mktemp("packed"))
    return job, run(job)[0]


@pytest.fixture
def plan(good: tuple[Job, Plan]) -> Plan:
    return good[1]


@pytest.fixture
def job(good: tuple[Job, Plan], tmp_path: Path) -> Job:
    """Return the job with a copy of its output."""
    shutil.copytree(good[0].output.path, tmp_path / "out")
    output = good[0].output.model_copy(update={"path": str(tmp_path / "out")})
    return good[0].model_copy(update={"output": output})


@pytest.fixture
def packed(plan: Plan) -> WorkUnit:
    return packed_unit(plan)


def packed_unit(plan: Plan) -> WorkUnit:
    """Return the unit with the rows of a, b, c and e."""
    [unit] = [unit for unit in plan.units if len(unit.pieces) > 1]
    return unit


def part_of(job: Job, unit: WorkUnit) -> Path:
    return Path(job.output.path) / part_name(unit.id)


def problems(job: Job) -> tuple[str, ...]:
    return verify(job.output.path).problems


def edit_records(job: Job, unit: WorkUnit, change: Callable[[Fields], Fields]) -> None:
    """Change the record in the footer of a unit's part, and its commit record in the same way."""
    part, record = part_of(job, unit), Path(job.output.path) / record_name(unit.id)
    table = pq.read_table(part)
    metadata = dict(table.schema.metadata or {})
    metadata[RECORD_KEY.encode()] = json.dumps(change(from_json(metadata[RECORD_KEY.encode()]))).encode()
    part.write_bytes(to_parquet(table.replace_schema_metadata(metadata)))
    record.write_bytes(to_json(change(from_json(record.read_bytes()))))
    rewrite(part, lambda table: table, record=True)


def with_pieces(change: Callable[[list[Fields]], Sequence[Fields]]) -> Callable[[Fields], Fields]:
    return lambda fields: {**fields, "pieces": list(change(fields["pieces"]))}


def reorder(*rows: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.take(list(rows))


def test_the_units_are_those_that_the_tests_assume(plan: Plan) -> None:
    names = [[piece.name.removesuffix(".parquet") for piece in unit.pieces] for unit in plan.units]
    assert names == [["d"], ["d"], ["d"], ["a", "b", "c", "e"], ["f"]]
    assert [piece.row_count for piece in packed_unit(plan).pieces] == [3, 1, 4, 2]


@pytest.mark.parametrize("own_ids", [True, False])
@pytest.mark.parametrize("batch_rows", [3, 8192])
def test_a_good_output_has_no_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_ids: bool, batch_rows: int
) -> None:
    """Batches begin and end in the middle of a file."""
    monkeypatch.setattr(part_check, "BATCH_ROWS", batch_rows)
    job = packed_files(tmp_path, **({"input": {"id_column": "n"}} if own_ids else {}))
    run(job)
    found = verify(job.output.path)
    assert found.problems == ()
    assert (found.totals.rows, found.totals.errors, found.parts) == (sum(PACKED_ROWS.values()), 5, 5)


ROWS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "two files": (reorder(3, 0, 1, 2, 4, 5, 6, 7, 8, 9), "its row 0 is b.parquet#0, not a.parquet#0"),
    "rows of the same number": (reorder(0, 5, 2, 3, 4, 1, 6, 7, 8, 9), "its row 1 is c.parquet#1, not a.parquet#1"),
    "rows of a file": (reorder(0, 1, 2, 3, 4, 5, 7, 6, 8, 9), "its row 6 is c.parquet#3, not c.parquet#2"),
    "a row twice": (reorder(0, 1, 2, 3, 4, 5, 6, 7, 8, 8), "its row 9 is e.parquet#0, not e.parquet#1"),
    "another unit's file": (
        with_column("source_file", lambda names: [*names[:3], "f.parquet", *names[4:]]),
        "its row 3 is f.parquet#0, not b.parquet#0",
    ),
    "no input file": (
        with_column("source_file", lambda names: [*names[:9], "x\ny"]),
        "its row 9 is x?y#1, not e.parquet#1",
    ),
    "null file": (
        with_column("source_file", lambda names: [*names[:4], None, *names[5:]]),
        "its row 4 is None#0, not c.parquet#0",
    ),
    "null row": (
        with_column("source_row", lambda rows: [*rows[:4], None, *rows[5:]]),
        "its row 4 is c.parquet#None, not c.parquet#0",
    ),
    "id of another file": (
        with_column("id", lambda ids: [*ids[:3], "a.parquet#0", *ids[4:]]),
        "id is not `<file>#<row>` in every row",
    ),
}


@pytest.mark.parametrize("damage", ROWS)
def test_rows_that_are_not_those_of_the_unit_are_named(job: Job, packed: WorkUnit, damage: str) -> None:
    change, said = ROWS[damage]
    rewrite(part_of(job, packed), change, record=True)
    assert problems(job) == (f"{part_name(packed.id)}: {said}; move it away and submit the job again",)


@pytest.mark.slow
@settings(max_examples=40)
@given(order=st.permutations(range(10)), batch_rows=st.sampled_from([1, 3, 4, 8192]))
def test_no_other_order_of_the_rows_is_good(good: tuple[Job, Plan], order: list[int], batch_rows: int) -> None:
    table = pq.read_table(part_of(good[0], packed_unit(good[1]))).take(order)
    wrong, place = None, 0
    for batch in table.combine_chunks().to_batches(batch_rows):
        wrong = wrong or part_check._check_sources(batch, packed_unit(good[1]), place)
        place += batch.num_rows
    assert (wrong is None) == (order == sorted(order))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_sources_are_those_that_the_unit_says(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [
        Piece("", f"{number}.parquet", chance.choice([0, 7]), chance.randint(1, 9))
        for number in range(chance.randint(1, 30))
    ]
    unit = WorkUnit("u", tuple(pieces))
    first = chance.randrange(unit.row_count)
    end = chance.randint(first + 1, unit.row_count)
    files, rows = sources(unit, first, end - first)
    names = [files.as_py()] * (end - first) if isinstance(files, pa.Scalar) else files.to_pylist()
    expected = [unit.locate(index) for index in range(first, end)]
    assert list(zip(names, rows.tolist(), strict=True)) == [(piece.name, row) for piece, row in expected]


RECORDS: dict[str, tuple[Callable[[Fields], Fields], str]] = {
    "order of pieces": (
        with_pieces(lambda pieces: [*pieces[:2], *pieces[:1:-1]]),
        "its piece 3 is rows 0 to 1 of e.parquet, not rows 0 to 3 of c.parquet",
    ),
    "another file": (
        with_pieces(lambda pieces: [pieces[0], {**pieces[1], "file": "f.parquet"}, *pieces[2:]]),
        "its piece 2 is rows 0 to 0 of f.parquet, not rows 0 to 0 of b.parquet",
    ),
    "other rows": (
        with_pieces(lambda pieces: [*pieces[:3], {**pieces[3], "first_row": 1}]),
        "its piece 4 is rows 1 to 2 of e.parquet, not rows 0 to 1 of e.parquet",
    ),
    "stamp of the third file": (
        with_pieces(lambda pieces: [*pieces[:2], {**pieces[2], "stamp": "mtime:1"}, pieces[3]]),
        "it was made of another version of c.parquet",
    ),
    "size of the last file": (
        with_pieces(lambda pieces: [*pieces[:3], {**pieces[3], "size": 1}]),
        "it was made of another version of e.parquet",
    ),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_of_other_pieces_is_named(job: Job, packed: WorkUnit, damage: str) -> None:
    change, said = RECORDS[damage]
    edit_records(job, packed, change)
    text = f"{part_name(packed.id)} is not the part of the plan's unit: {said}; {ADVICE}"
    assert problems(job)[0] == text


def test_a_part_without_the_rows_of_a_file_is_named(job: Job, plan: Plan, packed: WorkUnit) -> None:
    """Record, rows and totals of the part agree with each other, but not with the plan."""
    for pieces, said, gap in (
        (packed.pieces[:3], "it has 3 pieces, not 4", "e.parquet, rows 0 to 1"),
        (
            (packed.pieces[0], *packed.pieces[2:]),
            "its piece 2 is rows 0 to 3 of c.parquet, not rows 0 to 0 of b.parquet",
            "b.parquet, rows 0 to 0",
        ),
    ):
        part_of(job, packed).unlink()
        publish(job, plan, (replace(packed, pieces=pieces),))
        assert problems(job) == (
            f"{part_name(packed.id)} is not the part of the plan's unit: {said}; {ADVICE}",
            f"not complete, though _SUCCESS is there: rows have no part, such as {gap}; submit the job again",
        )


def test_a_record_without_one_of_the_pieces_is_named(job: Job, packed: WorkUnit) -> None:
    """The rows of the part are all there."""
    edit_records(job, packed, with_pieces(lambda pieces: pieces[:3]))
    assert problems(job)[0] == (
        f"{part_name(packed.id)} is truncated, damaged or no part: its footer has no unit record of this project; "
        "move it away and submit the job again"
    )


def test_a_commit_record_of_other_pieces_is_named(job: Job, packed: WorkUnit) -> None:
    """The message is short, though a record can have a thousand pieces."""
    record = Path(job.output.path) / record_name(packed.id)
    pieces = from_json(record.read_bytes())["pieces"]
    edit(record, pieces=[*pieces[:2], {**pieces[2], "stamp": "mtime:1"}, pieces[3]])
    piece = packed.pieces[2]
    assert problems(job) == (
        f"{record_name(packed.id)} does not agree with the part: it says piece 3 'rows 0 to 3 of c.parquet, "
        f"{piece.size}, mtime:1', not 'rows 0 to 3 of c.parquet, {piece.size}, {piece.stamp}'; move it away and submit "
        "the job again",
    )
    edit(record, pieces=pieces, rules={"units": 3, "prompts": 2})
    assert "does not agree with the part: it says rules {'units': 3" in problems(job)[0]


def test_a_missing_part_is_named_by_its_first_file(job: Job, packed: WorkUnit) -> None:
    part_of(job, packed).unlink()
    assert problems(job)[0] == (
        "not complete, though _SUCCESS is there: 1 of 5 units have no part, such as a.parquet, rows 0 to 2; submit the "
        "job again"
    )


def test_of_two_parts_with_the_same_files_only_the_wrong_one_is_named(job: Job, plan: Plan, packed: WorkUnit) -> None:
    extra = WorkUnit(unit_id("b.parquet", 0), packed.pieces[1:3])
    publish(job, plan, (extra,))
    assert problems(job) == (
        f"{part_name(extra.id)} holds rows 0 to 0 of b.parquet and of 1 more file, which are not the rows of a unit; "
        f"{ADVICE}",
    )


def test_a_part_of_a_file_that_is_no_input_is_named(job: Job, plan: Plan, packed: WorkUnit) -> None:
    id = unit_id("x.parquet", 0)
    strange = replace(with_piece(packed, name="x.parquet"), id=id)
    publish(job, plan, (strange,))
    said = f"{part_name(id)} holds rows of x.parquet, which is not an input file of the plan; move it away"
    assert said in problems(job)


def test_a_plan_with_other_units_over_the_same_rows_is_noticed(job: Job, packed: WorkUnit) -> None:
    """File e is moved to the unit of f, so that unit begins at another row and has another id."""
    path = Path(job.output.path) / PLAN
    packing = from_json(path.read_bytes())["packing"]
    assert packing[3:] == ["0-2 4", "5"]
    edit(path, packing=[*packing[:3], "0-2", "4-5"])
    found = problems(job)
    assert f"{part_name(packed.id)} is not the part of the plan's unit: it has 4 pieces, not 3" in found[0] + found[1]
    assert "holds rows 0 to 0 of f.parquet, which are not the rows of a unit" in found[0] + found[1]


# Outputs of earlier versions


@pytest.fixture
def old(tmp_path: Path) -> tuple[Job, Plan]:
    """Run the job with the units of earlier versions, none of which has rows of several files."""
    job = packed_files(tmp_path)
    return job, run(job, plan_by_old_rules(job))[0]


def test_an_output_of_an_earlier_version_is_good(old: tuple[Job, Plan]) -> None:
    job, plan = old
    fields = from_json(part_record(job, plan.units[0]))
    assert "pieces" not in fields
    assert fields["file"] == "a.parquet"
    assert "packing" not in from_json((Path(job.output.path) / PLAN).read_bytes())
    assert verify(job.output.path).parts == len(plan.units) == 8
    assert problems(job) == ()
    assert plan_of(job).units == plan.units


def test_of_two_parts_of_an_earlier_version_with_the_same_rows_both_are_named(old: tuple[Job, Plan]) -> None:
    """Its plan does not say where the files were cut, so neither of them is known to be the wrong one."""
    job, plan = old
    piece = replace(plan.units[0].pieces[0], first_row=1, row_count=2)
    extra = WorkUnit(unit_id(piece.name, 1), (piece,), rules=1)
    publish(job, plan, (extra,))
    assert problems(job)[0] == (
        f"{part_name(plan.units[0].id)} and {part_name(extra.id)} both hold row 1 of a.parquet: move both away and "
        "submit the job again"
    )


def part_record(job: Job, unit: WorkUnit) -> bytes:
    metadata = pq.read_metadata(part_of(job, unit)).metadata or {}
    return metadata[RECORD_KEY.encode()]


OLD: dict[str, tuple[Callable[[Fields], Fields], str]] = {
    "stamp": (
        lambda fields: {**fields, "stamp": "mtime:1"},
        "is not the part of the plan's unit: it was made of another version of a.parquet",
    ),
    "rows": (
        lambda fields: {**fields, "first_row": 1},
        "holds rows 1 to 3 of a.parquet, which are not the rows of a unit",
    ),
    "file": (
        lambda fields: {**fields, "file": "x.parquet"},
        "holds rows of x.parquet, which is not an input file of the plan",
    ),
    "pieces of two files": (
        lambda fields: {
            **{name: fields[name] for name in fields if name not in ("file", "first_row", "size", "stamp")},
            "pieces": [
                {**{name: fields[name] for name in ("file", "first_row", "size", "stamp")}, "rows": 2},
                {"file": "b.parquet", "first_row": 0, "rows": 1, "size": 1, "stamp": ""},
            ],
        },
        "holds rows 0 to 1 of a.parquet and of 1 more file, which are not the rows of a unit",
    ),
}


@pytest.mark.parametrize("damage", OLD)
def test_damage_in_the_records_of_an_earlier_version_is_named(old: tuple[Job, Plan], damage: str) -> None:
    (job, plan), (change, said) = old, OLD[damage]
    edit_records(job, plan.units[0], change)
    assert problems(job)[0].startswith(f"{part_name(plan.units[0].id)} {said}; ")


def test_other_rows_in_a_part_of_an_earlier_version_are_named(old: tuple[Job, Plan]) -> None:
    job, plan = old
    rewrite(part_of(job, plan.units[0]), reorder(0, 2, 1), record=True)
    assert f"{part_name(plan.units[0].id)}: its row 1 is a.parquet#2, not a.parquet#1" in problems(job)[0]


# clean


def test_segments_of_other_pieces_or_of_another_version_of_one_file_go(tmp_path: Path) -> None:
    job = packed_files(tmp_path)
    plan = plan_of(job)
    open_ledger(job, plan)
    unit = packed_unit(plan)
    store = store_of(job, plan)
    rows = result_table(unit, [complete_row(row) for row in store.input.read(unit).rows])
    store.input.close()

    def add(unit: WorkUnit, writer: str) -> None:
        store.write_segment(unit, rows, writer=writer * 32, number=0, attempt=1)

    add(unit, "a")
    add(with_piece(unit, 2, stamp="mtime:1"), "b")
    add(replace(unit, pieces=unit.pieces[:3]), "c")
    add(replace(unit, pieces=unit.pieces[::-1]), "d")
    [leftover] = find_leftovers(job.output.path)
    assert leftover.what == "segments of another job"
    assert [Path(file.name).name[0] for file in leftover.files] == ["b", "c", "d"]


def test_segments_of_an_earlier_version_stay_unless_their_file_is_another_version(tmp_path: Path) -> None:
    job = packed_files(tmp_path)
    plan = plan_by_old_rules(job)
    open_ledger(job, plan)
    store, unit = store_of(job, plan), plan.units[0]
    rows = result_table(unit, [complete_row(row) for row in store.input.read(unit).rows])
    store.input.close()
    store.write_segment(unit, rows, writer="a" * 32, number=0, attempt=1)
    assert find_leftovers(job.output.path) == []
    store.write_segment(with_piece(unit, stamp="mtime:1"), rows, writer="b" * 32, number=0, attempt=1)
    [leftover] = find_leftovers(job.output.path)
    assert [Path(file.name).name[0] for file in leftover.files] == ["b"]


# retry-errors


FAILED = [
    {"n": 1, "original_id": b"a.parquet#1"},
    {"n": 5, "original_id": b"c.parquet#1"},
    {"n": 6, "original_id": b"c.parquet#2"},
    {"n": 9, "original_id": b"d.parquet#1"},
    {"n": 33, "original_id": b"e.parquet#0"},
]
"""The rows of packed_files that fail. Three of them have the same number in their files."""


@pytest.mark.parametrize("old_rules", [False, True])
def test_the_rows_that_failed_are_taken_from_their_own_files(tmp_path: Path, old_rules: bool) -> None:
    job = packed_files(tmp_path)
    run(job, plan_by_old_rules(job) if old_rules else None)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    assert (made.rows, made.units_left) == (5, 0)
    rows = retried(tmp_path / "retry")
    assert [{"n": row["n"], "original_id": row["original_id"]} for row in rows] == FAILED
    assert [row["prompt"] for row in rows] == [None, None, b"", None, None]


def test_error_rows_of_a_file_that_the_record_does_not_name_are_refused(job: Job, packed: WorkUnit) -> None:
    """Without this check, row 1 of another file would be taken for the one that failed."""
    rename = with_column("source_file", lambda names: [names[0], "d.parquet", *names[2:]])
    rewrite(part_of(job, packed), rename, record=True)
    with pytest.raises(OutputError, match=r"it has rows of d\.parquet, which its record does not name; run `verify`"):
        make_retry_job(job.output.path, str(Path(job.output.path).parent / "retry"))
