"""Tests that a plan.json which is lost or damaged is made again from parts and segments, if all of them are this job's.

Nothing that was generated is generated again, and nothing is doubled.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.job import Job
from pipeline.core.errors import OutputError, StorageError
from pipeline.core.types import Totals
from pipeline.maintenance.verify import verify
from pipeline.output.begun import plan_job, read_begun
from pipeline.output.layout import MANIFEST, PLAN, SUCCESS, part_name
from pipeline.output.ledger import Ledger, read_status
from pipeline.output.part import result_table
from pipeline.output.records import RECORD_KEY
from pipeline.planning.checkpoint import check_checkpoint
from pipeline.planning.packing import Span, StoredUnits, spans_of, unit_id
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.prompts import Begun
from pipeline.storage.storage import Storage
from tests.pipeline.cases import complete_row, load, make_job, open_ledger, out, prompts, publish, store_of, write
from tests.pipeline.generation import generate

ROWS = {"a": 2, "b": 1, "d": 23, "f": 2, "h": 1, "sub/k": 3}
"""Rows of the input files by name. With five rows a unit, d has five units and the others share some."""


def begin(folder: Path, rules: int = 2) -> tuple[Job, Plan]:
    """Begin a job, publish two of its units, and save rows of a third one."""
    number = 0
    for name, rows in ROWS.items():
        write(folder / f"in/{name}.parquet", prompt=prompts(rows, number), group=10)
        number += rows
    job = make_job(folder / "in", folder / "out", output={"rows_per_file": 5}, workers={"gpus": 0})
    identity = check_checkpoint(job).identity()
    plan = make_plan(job, checkpoint_identity=identity, stored=StoredUnits(rules))
    open_ledger(job, plan)
    publish(job, plan, (plan.units[1], plan.units[-1]))
    save(job, plan, 3)
    return job, plan


def save(job: Job, plan: Plan, unit: int, writer: str = "5") -> None:
    """Write a segment with the first row of a unit."""
    store = store_of(job, plan)
    rows = store.input.read(plan.units[unit]).rows[:1]
    store.input.close()
    table = result_table(plan.units[unit], [complete_row(row) for row in rows])
    store.write_segment(plan.units[unit], table, writer=writer * 32, number=0, attempt=1)


def extending(job: Job) -> Job:
    return job.model_copy(update={"input": job.input.model_copy(update={"on_change": "extend"})})


def parts(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out(job).glob("part-*")}


def source_rows(job: Job) -> list[tuple[str, int]]:
    tables = [pq.read_table(part, columns=["source_file", "source_row"]) for part in out(job).glob("part-*")]
    return sorted((row["source_file"], row["source_row"]) for table in tables for row in table.to_pylist())


def content(plan: dict[str, object]) -> dict[str, object]:
    """Return what a plan.json says of the job, without the time when it began, which is lost with it."""
    return {**plan, "created": "", "checksum": ""}


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zero(data: bytes) -> bytes:
    return bytes(len(data))


def empty(_data: bytes) -> bytes:
    return b""


def flip(data: bytes) -> bytes:
    """Flip a bit inside the fields of the fingerprint, so that the JSON stays readable."""
    at = data.index(b'"model.dtype"') + 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "lost": None,
    "truncated": truncate,
    "zeroed": zero,
    "empty": empty,
    "one bit flipped": flip,
}


def damage(job: Job, how: str) -> None:
    path, change = out(job, PLAN), DAMAGES[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("rules", [2, 1])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_half_done_job_goes_on_with_its_units(
    tmp_path: Path, how: str, rules: int, caplog: pytest.LogCaptureFixture
) -> None:
    job, plan = begin(tmp_path, rules)
    stored, before = load(out(job, PLAN)), parts(job)
    damage(job, how)
    with pytest.raises(OutputError, match=r"submit the same job again, which makes the plan again") as said:
        read_status(job.output.path)
    assert "delete" not in str(said.value)
    _, generated = generate(job)
    assert "it was made again, and the finished rows of 3 units are kept" in caplog.text
    assert content(load(out(job, PLAN))) == content(stored)
    done = {spans_of(plan.units[1])[0], *spans_of(plan.units[-1])}
    assert len(generated) == plan.rows - sum(span.rows for span in done) - 1
    assert before.items() <= parts(job).items()
    assert source_rows(job) == sorted((f"{name}.parquet", row) for name, rows in ROWS.items() for row in range(rows))
    assert not verify(job.output.path).problems


def test_an_output_of_the_first_rules_of_units_and_of_prompts_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    """Its parts name no rules, and the text of its prompt column was tokenised otherwise than today."""
    job, _ = begin(tmp_path, 1)
    shutil.rmtree(out(job))
    identity = check_checkpoint(job).identity()
    plan = make_plan(job, checkpoint_identity=identity, begun=Begun(rules=1), stored=StoredUnits(1))
    assert not {"prompts", "work units"} & plan.fingerprint.fields.keys()
    open_ledger(job, plan)
    publish(job, plan, plan.units[:1])
    stored = load(out(job, PLAN))
    out(job, PLAN).unlink()
    again = plan_job(job, check_checkpoint(job))
    assert again.prompts.rules == 1
    open_ledger(job, again)
    assert content(load(out(job, PLAN))) == content(stored)


def test_an_output_that_was_extended_keeps_the_units_of_both_runs(tmp_path: Path) -> None:
    """A new packing of all files would give other units than the two runs have made."""
    job, plan = begin(tmp_path)
    write(tmp_path / "in/aa.parquet", prompt=prompts(1, 100))
    write(tmp_path / "in/e.parquet", prompt=prompts(2, 200))
    longer = plan_job(job, check_checkpoint(job))
    open_ledger(extending(job), longer)
    publish(job, longer, longer.units[-1:])
    assert [span.file for span in spans_of(longer.units[-1])] == ["aa.parquet", "e.parquet"]
    out(job, PLAN).unlink()
    again = plan_job(job, check_checkpoint(job))
    kept = {spans_of(unit) for unit in (plan.units[1], plan.units[3], plan.units[-1], longer.units[-1])}
    assert kept <= {spans_of(unit) for unit in again.units}
    before = parts(job)
    _, generated = generate(job)
    assert before.items() <= parts(job).items()
    files = {**ROWS, "aa": 1, "e": 2}
    assert source_rows(job) == sorted((f"{name}.parquet", row) for name, rows in files.items() for row in range(rows))
    assert len(generated) == sum(files.values()) - sum(pq.read_metadata(out(job, name)).num_rows for name in before) - 1
    assert not verify(job.output.path).problems


@pytest.mark.parametrize("seed", range(12))
def test_any_units_that_are_left_are_kept_and_every_row_is_in_one(tmp_path: Path, seed: int) -> None:
    """Which units have a part, and which files are added and when, is chosen by chance."""
    chance = random.Random(seed)
    sizes = {name: chance.choice([1, 2, 4, 7, 30]) for name in chance.sample("abcdefghijkl", 8)}
    names = list(sizes)
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 5}, workers={"gpus": 0})
    identity = check_checkpoint(job).identity()
    units: dict[str, tuple[Span, ...]] = {}
    for added in (names[:5], names[5:]):
        for name in added:
            write(tmp_path / f"in/{name}.parquet", prompt=prompts(sizes[name]), group=chance.choice([3, 8, 50]))
        plan = plan_job(job, check_checkpoint(job))
        open_ledger(extending(job), plan)
        new = [unit for unit in plan.units if unit.id not in units and chance.random() < 0.4] or plan.units[-1:]
        publish(job, plan, tuple(unit for unit in new if unit.id not in units))
        units |= {unit.id: spans_of(unit) for unit in new}
    out(job, PLAN).unlink()
    again = plan_job(job, check_checkpoint(job))
    assert again.fingerprint == make_plan(job, checkpoint_identity=identity).fingerprint
    found = {unit.id: spans_of(unit) for unit in again.units}
    assert units.items() <= found.items()
    rows = [(span.file, row) for spans in found.values() for span in spans for row in range(span.rows)]
    assert len(rows) == len({(s.file, s.first_row + r) for u in found.values() for s in u for r in range(s.rows)})
    assert len(rows) == sum(sizes.values())
    assert max(unit.row_count for unit in again.units) <= 5
    assert set(open_ledger(job, again).finished(again)) == units.keys()


def test_a_complete_output_is_complete_again(tmp_path: Path) -> None:
    job, _ = begin(tmp_path)
    generate(job)
    before, manifest = parts(job), load(out(job, MANIFEST))
    damage(job, "truncated")
    outcome, generated = generate(job)
    assert (generated, outcome.ran_units) == ([], 0)
    assert parts(job) == before
    assert read_status(job.output.path).complete
    assert load(out(job, MANIFEST))["rows"] == manifest["rows"]
    assert not verify(job.output.path).problems


def test_files_that_came_after_a_complete_run_are_refused_as_with_a_plan(tmp_path: Path) -> None:
    job, _ = begin(tmp_path)
    generate(job)
    out(job, PLAN).unlink()
    write(tmp_path / "in/z.parquet", prompt=prompts(1))
    with pytest.raises(OutputError, match=r"complete with 6 input files, and there are 7 now: set input\.on_change"):
        generate(job)
    _, generated = generate(extending(job))
    assert generated == ["z.parquet#0"]


@pytest.mark.parametrize("what", ["part", "segment"])
def test_the_day_of_the_prompts_is_that_of_the_parts_or_of_the_segments(tmp_path: Path, what: str) -> None:
    """A segment names it as well, for an output that has no part yet."""
    job, plan = begin(tmp_path)
    out(job, PLAN).unlink()
    out(job, part_name(plan.units[-1].id)).unlink()
    part, [segment] = out(job, part_name(plan.units[1].id)), out(job).glob("_job/segments/*/*")
    path, key = (part, RECORD_KEY.encode()) if what == "part" else (segment, b"twotower.segment")
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata or {})
    assert b"prompt_date" not in metadata[key]  # jobs without a chat template have no such day
    if what == "segment":
        part.unlink()
    metadata[key] = json.dumps({**json.loads(metadata[key]), "prompt_date": "2026-01-31"}).encode()
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert read_begun(job)[0].date == "2026-01-31"


# Refusals


def refusal(job: Job) -> str:
    with pytest.raises(OutputError) as caught:
        generate(job)
    said = str(caught.value)
    assert "\n" not in said
    assert "delete" not in said
    assert not out(job, PLAN).exists()
    return said


def test_another_jobs_rows_are_not_taken(tmp_path: Path) -> None:
    job, _ = begin(tmp_path)
    out(job, PLAN).unlink()
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4})})
    said = refusal(other)
    assert "is of a job with other settings or another checkpoint (its fingerprint is " in said
    assert said.endswith("submit that job, or use another output.path")


@pytest.mark.parametrize("what", ["part", "segment"])
def test_rows_of_two_jobs_are_both_named(tmp_path: Path, what: str) -> None:
    job, plan = begin(tmp_path)
    other = make_job(tmp_path / "in", tmp_path / "other", generation={"seed": 4}, output={"rows_per_file": 5})
    theirs = make_plan(other, checkpoint_identity=check_checkpoint(job).identity())
    open_ledger(other, theirs)
    if what == "part":
        publish(other, theirs, theirs.units[:1])
        stranger = part_name(theirs.units[0].id)
        shutil.copy(out(other, stranger), out(job, stranger))
    else:
        save(other, theirs, 0)
        [path] = out(other).glob("_job/segments/*/*")
        stranger = str(path.relative_to(out(other)))
        out(job, stranger).parent.mkdir()
        shutil.copy(path, out(job, stranger))
    out(job, PLAN).unlink()
    said = refusal(job)
    assert f"is of this job, and {stranger} of another one: move the other job's files away" in said
    assert any(f"{part_name(plan.units[index].id)} is of this job" in said for index in (1, -1))


@pytest.mark.parametrize("change", ["gone", "rewritten"])
def test_an_input_file_that_is_not_as_it_was_is_named(tmp_path: Path, change: str) -> None:
    job, _ = begin(tmp_path)
    out(job, PLAN).unlink()
    path = tmp_path / "in/sub/k.parquet"
    path.unlink()
    if change == "rewritten":
        write(path, prompt=prompts(4))
    assert f"sub/k.parquet{', of which part-' if change == 'gone' else ' has changed since part-'}" in refusal(job)


def test_a_broken_part_is_named_and_the_rest_helps_once_it_is_moved_away(tmp_path: Path) -> None:
    job, plan = begin(tmp_path)
    out(job, PLAN).unlink()
    part = out(job, part_name(plan.units[1].id))
    part.write_bytes(part.read_bytes()[:-100])
    assert f"{part.name} is broken" in refusal(job)
    part.rename(tmp_path / part.name)
    generate(job)
    assert not verify(job.output.path).problems


def test_a_damaged_segment_and_an_empty_part_do_not_stand_in_the_way(tmp_path: Path) -> None:
    job, plan = begin(tmp_path)
    out(job, PLAN).unlink()
    [segment] = out(job).glob("_job/segments/*/*")
    segment.write_bytes(segment.read_bytes()[:-100])
    out(job, part_name(plan.units[0].id)).touch()
    generate(job)
    assert not verify(job.output.path).problems


def test_parts_with_the_same_rows_are_both_named(tmp_path: Path) -> None:
    job, plan = begin(tmp_path)
    out(job, PLAN).unlink()
    small = make_plan(job, checkpoint_identity=check_checkpoint(job).identity(), stored=StoredUnits())
    unit = next(unit for unit in small.units if len(unit.pieces) > 1 and unit.id == plan.units[-1].id)
    whole = unit.part(unit.pieces[0].row_count, unit.row_count)
    doubled = type(unit)(unit_id(whole.pieces[0].name, 0), whole.pieces)
    publish(job, plan, (doubled,))
    said = refusal(job)
    assert part_name(doubled.id) in said
    assert part_name(unit.id) in said


@pytest.mark.parametrize("lost", [PLAN, MANIFEST, SUCCESS])
@pytest.mark.parametrize("times", [1, 99])
def test_a_write_that_is_confirmed_and_lost_is_made_again_or_named(
    tmp_path: Path, lost: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, plan = begin(tmp_path)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    if lost == PLAN:
        out(job, PLAN).unlink()
    write_file, left = Storage.write, [times]

    def lossy(self: Storage, name: str, data: bytes) -> None:
        if name == lost and left[0]:
            left[0] -= 1
            return
        write_file(self, name, data)

    monkeypatch.setattr(Storage, "write", lossy)
    if times == 1:
        ledger.complete(plan, job, totals, seconds=1.0)
        assert read_status(job.output.path).complete
        assert not verify(job.output.path).problems
    else:
        with pytest.raises(StorageError, match=rf"{lost} is not there as it was written"):
            ledger.complete(plan, job, totals, seconds=1.0)


def test_a_part_that_is_not_in_the_plan_is_good_after_the_plan_is_moved_away(tmp_path: Path) -> None:
    """An older copy of plan.json was put back. The text says what to do, and that loses nothing."""
    job, _ = begin(tmp_path)
    old = out(job, PLAN).read_bytes()
    write(tmp_path / "in/aa.parquet", prompt=prompts(1, 100))
    generate(extending(job))
    write(tmp_path / "in/ab.parquet", prompt=prompts(1, 101))
    out(job, PLAN).write_bytes(old)
    with pytest.raises(OutputError, match=r"move _job/plan\.json away and submit the job again") as caught:
        generate(extending(job))
    assert "delete" not in str(caught.value)
    before = parts(job)
    out(job, PLAN).unlink()
    _, generated = generate(extending(job))
    assert generated == ["ab.parquet#0"]
    assert before.items() <= parts(job).items()
    assert not verify(job.output.path).problems


def test_any_wrong_bit_in_a_plan_is_noticed(tmp_path: Path) -> None:
    """A name of a file, a stamp or a day with one wrong bit is still a name, a stamp or a day: the output was then
    refused as one of other input files, or the rows that were left got prompts of another day."""
    job, plan = begin(tmp_path)
    path = out(job, PLAN)
    good, units = path.read_bytes(), {unit.id: spans_of(unit) for unit in plan.units}
    record, chance = Ledger(job.output.path).last_plan(), random.Random(19)
    names = [good.index(name.encode()) + 1 for name in ("d.parquet", "mtime:", "created")]
    for place in [*names, *chance.sample(range(len(good)), 200)]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert Ledger(job.output.path).last_plan() in (None, record)
    for place in names[:2]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        again = plan_job(job, check_checkpoint(job))
        open_ledger(job, again)
        assert {unit.id: spans_of(unit) for unit in again.units} == units


def test_a_plan_without_a_checksum_is_read(tmp_path: Path) -> None:
    """Plans of earlier versions have none."""
    job, _ = begin(tmp_path)
    path = out(job, PLAN)
    record = Ledger(job.output.path).last_plan()
    head, mark, _ = path.read_bytes().rpartition(b',\n "checksum"')
    assert mark
    path.write_bytes(head + b"\n}\n")
    assert Ledger(job.output.path).last_plan() == record
