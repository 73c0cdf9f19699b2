"""Tests that a half-done output of small files keeps its units, its parts and its saved rows when its input grows.

Files that are added sort before, between and after the old ones, so that a new packing of all files would give other
units. Outputs that were begun with version 1 of the unit rules are extended as well.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.driver.run
import pipeline.output.ledger
from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.types import Totals, WorkUnit
from pipeline.maintenance.verify import verify
from pipeline.output.begun import plan_job
from pipeline.output.claim import Claim
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import check_writable
from pipeline.output.ledger import Ledger
from pipeline.output.part import result_table
from pipeline.planning.checkpoint import check_checkpoint
from pipeline.planning.packing import Span, StoredUnits, spans_of
from pipeline.planning.plan import Plan, make_plan
from tests.pipeline.cases import complete_row, load, make_job, open_ledger, out, publish, store_of, write
from tests.pipeline.generation import generate

FILES = {"b": 1, "d": 2, "f": 12, "h": 2, "k": 2, "m": 3, "sub/p": 1, "sub/q": 2}
"""Rows of the first files by name. With five rows a unit, f has three units, and the others share (b, d, h), (k, m)
and (sub/p, sub/q)."""
PACKING = [*("2:0+4", "2:4+4", "2:8+4"), "0-1 3", "4-5", "6-7"]
"""The lines of plan.json for these units."""
DONE = ("f#0", "b#0")
"""Rows whose units have their parts."""
SAVED = ("k#1", "m#1")
"""Rows in segments. Their units have nothing else."""
EXTENSIONS = {
    "first": [{"a": 1}],
    "between": [{"e": 2}],
    "in the folder": [{"sub/pp": 1}],
    "last": [{"z": 1}],
    "large": [{"g": 11}],
    "two at once": [{"a": 1, "e": 1}],
    "two, one after the other": [{"a": 1}, {"e": 1}],
    "twice, the second one first": [{"e": 1, "l": 2}, {"a": 1, "sub/pp": 2}],
    "without rows": [{"c": 0}],
    "without rows, then with": [{"a": 0, "e": 0}, {"aa": 1, "z": 0}],
}
"""Rows by name of the files that are added before each further run."""


def add(job: Job, files: dict[str, int]) -> None:
    """Write files with this number of rows. Each prompt names its row."""
    for name, rows in files.items():
        cells = pa.array([f"{name}#{row}" for row in range(rows)], pa.string())
        write(Path(job.input.path) / f"{name}.parquet", prompt=cells)


def extending(job: Job) -> Job:
    return job.model_copy(update={"input": job.input.model_copy(update={"on_change": "extend"})})


def keys_of(unit: WorkUnit) -> list[str]:
    """Return the rows of a unit as `<file without .parquet>#<row>`."""
    places = [unit.locate(index) for index in range(unit.row_count)]
    return [f"{piece.name.removesuffix('.parquet')}#{row}" for piece, row in places]


def begin(folder: Path, rules: int) -> tuple[Job, Plan]:
    """Begin the output of a job over FILES with this version of the unit rules, and do a part of it."""
    settings = {"output": {"rows_per_file": 5}, "workers": {"gpus": 0}}
    job = make_job(folder / "in", folder / "out", **settings)
    add(job, FILES)
    identity = check_checkpoint(job).identity()
    plan = make_plan(job, checkpoint_identity=identity, stored=StoredUnits(rules))
    open_ledger(job, plan)
    publish(job, plan, tuple(unit for unit in plan.units if set(DONE) & set(keys_of(unit))))
    for unit in plan.units:
        if chosen := [index for index, key in enumerate(keys_of(unit)) if key in SAVED]:
            save(job, plan, unit, chosen)
    return job, plan


def save(job: Job, plan: Plan, unit: WorkUnit, rows: Sequence[int]) -> None:
    """Write a segment with rows of a unit. No engine of the tests makes their completions."""
    store = store_of(job, plan)
    results = [complete_row(store.input.read(unit).rows[index]) for index in rows]
    store.input.close()
    texts = [dataclasses.replace(result.completion, text=f"saved: {result.index}") for result in results]
    results = [dataclasses.replace(result, completion=text) for result, text in zip(results, texts, strict=True)]
    store.write_segment(unit, result_table(unit, results), writer="5" * 32, number=0, attempt=1)


def parts(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out(job).glob("part-*.parquet")}


def packing(job: Job) -> list[tuple[Span, ...]]:
    return list(PlanRecord.read(out(job, "_job/plan.json").read_bytes()).units_stored)


def rows_of(job: Job) -> dict[str, str]:
    """Return the completion of each row of the output by `<file without .parquet>#<row>`. Fails if a row is there
    twice, or with the completion of another row."""
    found: dict[str, str] = {}
    for part in out(job).glob("part-*.parquet"):
        for row in pq.read_table(part).to_pylist():
            key = f"{row['source_file'].removesuffix('.parquet')}#{row['source_row']}"
            assert key not in found
            assert row["id"] == f"{row['source_file']}#{row['source_row']}"
            assert row["completion"] in (f"answer to {key}", key[::-1]) or row["completion"].startswith("saved: ")
            found[key] = row["completion"]
    return found


def keys(files: dict[str, int]) -> set[str]:
    return {f"{name}#{row}" for name, rows in files.items() for row in range(rows)}


def test_the_first_units_are_as_the_tests_say(tmp_path: Path) -> None:
    job, plan = begin(tmp_path, 2)
    assert load(out(job, "_job/plan.json"))["packing"] == PACKING
    assert {len(unit.pieces) for unit in plan.units} == {1, 2, 3}
    assert len(parts(job)) == 2
    assert len(list(out(job).glob("_job/segments/*/*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "name"), [*((2, name) for name in EXTENSIONS), (1, "twice, the second one first"), (1, "without rows")]
)
def test_old_units_stay_and_every_row_is_generated_once(tmp_path: Path, rules: int, name: str) -> None:
    """The first of the runs that add files also does what the half-done output left, and no saved row again."""
    job, plan = begin(tmp_path, rules)
    units = {unit.id: (unit.pieces, unit.rules) for unit in plan.units}
    first = {key for unit in plan.units if not set(DONE) & set(keys_of(unit)) for key in keys_of(unit)} - set(SAVED)
    files, left = dict(FILES), first
    for added in EXTENSIONS[name]:
        before, stored = parts(job), packing(job)
        add(job, added)
        files |= added
        longer = plan_job(job, check_checkpoint(job))
        assert longer.fingerprint == plan.fingerprint
        now = {unit.id: (unit.pieces, unit.rules) for unit in longer.units}
        assert units.items() <= now.items()
        units = now

        outcome, generated = generate(extending(job))
        assert generated == sorted(f"{key.replace('#', '.parquet#')}" for key in left | keys(added))
        left = set()
        assert outcome.units == len(units)
        assert before.items() <= parts(job).items()
        assert set(parts(job)) == {f"part-{unit}.parquet" for unit in units}
        assert packing(job)[: len(stored)] == stored
        rows = rows_of(job)
        assert rows.keys() == keys(files)
        assert all(rows[key].startswith("saved: ") for key in SAVED)
        manifest = load(out(job, "_job/manifest.json"))
        counts = {name: manifest[name] for name in ("rows", "ok", "units", "files")}
        assert counts == {"rows": len(rows), "ok": len(rows), "units": len(units), "files": len(files)}
        assert Ledger(job.output.path).is_complete()
        assert not verify(job.output.path).problems
    units_now = {spans_of(unit) for unit in plan_job(job, check_checkpoint(job)).units}
    assert set(packing(job)) == (units_now if rules > 1 else set())


def test_a_unit_that_has_nothing_yet_stays_as_well(tmp_path: Path) -> None:
    """sub/pp would fit between sub/p and sub/q, whose unit has room for it and has no part and no segment."""
    job, _ = begin(tmp_path, 2)
    add(job, {"sub/pp": 1})
    *old, new = plan_job(job, check_checkpoint(job)).units
    assert keys_of(old[-1]) == ["sub/p#0", "sub/q#0", "sub/q#1"]
    assert keys_of(new) == ["sub/pp#0"]


def test_a_run_that_adds_nothing_leaves_the_plan_as_it_is(tmp_path: Path) -> None:
    job, plan = begin(tmp_path, 2)
    add(job, {"a": 1})
    generate(extending(job))
    stored = out(job, "_job/plan.json").read_bytes()
    outcome, generated = generate(job)
    assert (outcome.ran_units, generated) == (0, [])
    assert out(job, "_job/plan.json").read_bytes() == stored
    assert len(load(out(job, "_job/plan.json"))["packing"]) == len(plan.units) + 1


def test_a_job_with_other_settings_gets_units_of_its_own(tmp_path: Path) -> None:
    """The plan of its preview must not be cut as the other job's output is."""
    job, _ = begin(tmp_path, 2)
    other = job.model_copy(update={"output": job.output.model_copy(update={"rows_per_file": 100})})
    assert len(plan_job(other, check_checkpoint(other)).units) == 1


def test_a_run_that_was_planned_before_another_one_added_files_is_refused(tmp_path: Path) -> None:
    """Its unit (a, aa) would begin with the same row, and so have the same id, as the unit (a) of the other run."""
    job, _ = begin(tmp_path, 2)
    add(job, {"a": 1})
    first = plan_job(job, check_checkpoint(job))
    add(job, {"aa": 1})
    second = plan_job(job, check_checkpoint(job))
    assert first.units[-1].id == second.units[-1].id
    open_ledger(extending(job), first)
    stored = out(job, "_job/plan.json").read_bytes()
    with pytest.raises(OutputError, match="another run of this job has added input files meanwhile: submit the job"):
        open_ledger(extending(job), second)
    assert out(job, "_job/plan.json").read_bytes() == stored
    _, generated = generate(extending(job))  # submitted again, it is planned anew
    assert generated[:2] == ["a.parquet#0", "aa.parquet#0"]
    assert packing(job)[-2:] == [(Span("a.parquet", 0, 1),), (Span("aa.parquet", 0, 1),)]


def test_a_run_that_was_planned_over_the_same_files_by_then_is_refused(tmp_path: Path) -> None:
    """The other run has added the same files, but in two steps. The listings are equal, and the units are not."""
    job, _ = begin(tmp_path, 2)
    add(job, {"a": 1, "aa": 1})
    at_once = plan_job(job, check_checkpoint(job))
    away = Path(job.input.path) / "aa.parquet"
    away.rename(tmp_path / "aa.parquet")
    open_ledger(extending(job), plan_job(job, check_checkpoint(job)))
    (tmp_path / "aa.parquet").rename(away)
    in_steps = plan_job(job, check_checkpoint(job))
    open_ledger(extending(job), in_steps)
    assert at_once.listing == in_steps.listing
    with pytest.raises(OutputError, match="another run of this job has added input files meanwhile"):
        open_ledger(extending(job), at_once)


def test_runs_that_add_the_same_files_have_the_same_units(tmp_path: Path) -> None:
    job, _ = begin(tmp_path, 2)
    add(job, {"a": 1, "aa": 1})
    one, other = (plan_job(job, check_checkpoint(job)) for _ in range(2))
    open_ledger(extending(job), one)
    stored = out(job, "_job/plan.json").read_bytes()
    open_ledger(extending(job), other)
    assert out(job, "_job/plan.json").read_bytes() == stored
    assert one.units == other.units


def two_plans(folder: Path) -> tuple[Job, Plan, Plan]:
    """Return a half-done job and the plans of two runs that extend it at the same time, with different units."""
    job, _ = begin(folder, 2)
    add(job, {"a": 1})
    one = plan_job(job, check_checkpoint(job))
    add(job, {"aa": 1})
    return extending(job), one, plan_job(job, check_checkpoint(job))


def test_a_run_is_refused_if_another_one_adds_files_while_it_prepares_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has found the old plan when it began to open the output."""
    job, other, plan = two_plans(tmp_path)

    def check_slowly(url: str) -> None:
        monkeypatch.setattr(pipeline.output.ledger, "check_writable", check_writable)
        open_ledger(job, other)
        check_writable(url)

    monkeypatch.setattr(pipeline.output.ledger, "check_writable", check_slowly)
    with pytest.raises(OutputError, match="another run of this job has added input files meanwhile"):
        open_ledger(job, plan)
    assert packing(job)[-1] == (Span("a.parquet", 0, 1),)


def test_a_run_whose_plan_was_replaced_ends_before_it_generates_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run has replaced the plan just before this one claims the output. Its parts would not be those of the
    plan."""
    job, other, plan = two_plans(tmp_path)
    stored = out(job, "_job/plan.json").read_bytes()
    open_ledger(job, other)
    theirs = out(job, "_job/plan.json").read_bytes()
    out(job, "_job/plan.json").write_bytes(stored)

    def claim_late(output: str) -> Claim:
        assert packing(job)[-1] == spans_of(plan.units[-1])
        out(job, "_job/plan.json").write_bytes(theirs)
        return Claim(output)

    monkeypatch.setattr(pipeline.driver.run, "Claim", claim_late)
    before = parts(job)
    with pytest.raises(OutputError, match=r"another run by now, .* aa\.parquet is new; submit the job again"):
        generate(job)
    assert parts(job) == before


def test_a_run_with_other_units_of_the_same_files_does_not_complete_the_job(tmp_path: Path) -> None:
    """Another run has added the same files in two steps, after this one had opened the output."""
    job, _, plan = two_plans(tmp_path)
    ledger = open_ledger(job, plan)
    done = ledger.finished(plan)
    results = [*done.values(), *publish(job, plan, tuple(unit for unit in plan.units if unit.id not in done))]
    record = load(out(job, "_job/plan.json"))
    assert record["packing"][-1] == "0-1"
    changed = {**record, "packing": [*record["packing"][:-1], "0", "1"], "units": record["units"] + 1}
    out(job, "_job/plan.json").write_text(json.dumps(changed))
    totals = sum((result.totals for result in results), Totals())
    with pytest.raises(OutputError, match="another run of this job has added input files meanwhile"):
        ledger.complete(plan, job, totals, seconds=1.0)
    assert not ledger.is_complete()


def test_a_run_that_is_overtaken_by_one_with_the_same_units_does_not_reopen_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run has added the same files and completed the job while this one prepared its plan."""
    job, _, plan = two_plans(tmp_path)

    def check_slowly(url: str) -> None:
        monkeypatch.setattr(pipeline.output.ledger, "check_writable", check_writable)
        generate(job)
        check_writable(url)

    monkeypatch.setattr(pipeline.output.ledger, "check_writable", check_slowly)
    assert open_ledger(job, plan).is_complete()
