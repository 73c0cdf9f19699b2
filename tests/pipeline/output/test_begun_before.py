"""Tests that an output which was begun before units had several pieces is resumed with its own units.

The folder `begun_before` was written by the code before that, with tests/pipeline/cases.py: four units over three
files, of which two have their parts, one has two rows in a segment, and one has nothing.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.checkpoint.reader import Checkpoint
from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.types import UNIT_RULES
from pipeline.maintenance.verify import verify
from pipeline.output.ledger import Ledger, read_status
from pipeline.output.records import RECORD_KEY, from_json
from pipeline.planning.fingerprint import differences
from pipeline.planning.packing import spans_of
from tests.pipeline.cases import CHECKPOINT, load, make_job, open_ledger, out, plan_of, prompts, store_of, write
from tests.pipeline.generation import generate

BEGUN_BEFORE = Path(__file__).parent / "begun_before"
UNITS = {
    "cb8eb0d4cd41-0000000000": ("a.parquet", 0, 3),
    "cb8eb0d4cd41-0000000003": ("a.parquet", 3, 4),
    "cbd33ec75833-0000000000": ("sub/b.parquet", 0, 3),
    "39d035be5e19-0000000000": ("sub/c.parquet", 0, 2),
}
DONE = ("cb8eb0d4cd41-0000000000", "cbd33ec75833-0000000000")
"""The units that have a part and a commit record."""
SAVED, OPEN = "cb8eb0d4cd41-0000000003", "39d035be5e19-0000000000"
"""The unit with a segment, and the one without."""
SAVED_ROWS = {4: "saved before: 1", 6: "saved before: 3"}
"""The rows in the segment: number in the file -> completion. No engine of the tests makes these texts."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Copy the folder. The input files get the times that its plan.json names, as a checkout does not keep them."""
    shutil.copytree(BEGUN_BEFORE, tmp_path, dirs_exist_ok=True)
    for file in load(tmp_path / "out/_job/plan.json")["files"]:
        os.utime(tmp_path / "in" / file["name"], (float(file["stamp"].removeprefix("mtime:")),) * 2)
    monkeypatch.setattr(Checkpoint, "identity", lambda _: CHECKPOINT)
    lenient = {"max_error_rate": 0.5}  # two of twelve prompts cannot be used
    return make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 4}, workers={"gpus": 0}, retry=lenient)


def extending(job: Job) -> Job:
    return job.model_copy(update={"input": job.input.model_copy(update={"on_change": "extend"})})


def contents(job: Job, pattern: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out(job).glob(pattern)}


def rows_of(job: Job) -> dict[tuple[str, int], Any]:
    """Return the completion of each row of the output by file and number. Fails if a row is there twice."""
    columns = ["source_file", "source_row", "completion"]
    parts = [pq.read_table(part, columns=columns).to_pylist() for part in out(job).glob("part-*.parquet")]
    rows = [row for part in parts for row in part]
    found = {(row["source_file"], row["source_row"]): row["completion"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_its_plan_is_that_of_today(job: Job) -> None:
    """The units, their ids and the fingerprint are those of plan.json, which is not written again."""
    stored = out(job, "_job/plan.json").read_bytes()
    plan = plan_of(job)
    assert {unit.id: tuple(spans_of(unit)[0]) for unit in plan.units} == UNITS
    assert {(len(unit.pieces), unit.rules) for unit in plan.units} == {(1, 1)}
    assert plan.fingerprint.digest == load(out(job, "_job/plan.json"))["fingerprint"]["digest"]
    assert set(open_ledger(job, plan).finished(plan)) == set(DONE)
    assert out(job, "_job/plan.json").read_bytes() == stored
    status = read_status(job.output.path)
    assert (status.units_done, status.units_total, status.rows_done, status.rows_saved) == (2, 4, 6, 2)


def test_its_segment_is_read(job: Job) -> None:
    plan = plan_of(job)
    store = store_of(job, plan)
    saved = store.read_segments(next(unit for unit in plan.units if unit.id == SAVED))
    store.input.close()
    assert saved.ignored == ()
    assert dict(zip(*(saved.table[name].to_pylist() for name in ("source_row", "completion")), strict=True)) == (
        SAVED_ROWS
    )


def test_it_is_completed(job: Job) -> None:
    """Only the rows that are in no part and no segment are generated, and nothing that was finished is touched."""
    stored = out(job, "_job/plan.json").read_bytes()
    finished = contents(job, "part-*") | contents(job, "_job/units/*")
    assert len(finished) == 4
    outcome, generated = generate(job)
    assert generated == ["a.parquet#3", "a.parquet#5", "sub/c.parquet#0", "sub/c.parquet#1"]
    assert (outcome.units, outcome.ran_units) == (4, 2)
    after = contents(job, "part-*") | contents(job, "_job/units/*")
    assert finished.items() <= after.items()
    assert {path.name.removeprefix("part-").partition(".")[0] for path in after} == UNITS.keys()
    assert out(job, "_job/plan.json").read_bytes() == stored
    rows = rows_of(job)
    assert rows.keys() == {(name, first + row) for name, first, count in UNITS.values() for row in range(count)}
    assert {row: rows["a.parquet", row] for row in SAVED_ROWS} == SAVED_ROWS
    manifest = load(out(job, "_job/manifest.json"))
    assert (manifest["rows"], manifest["errors"], manifest["units"], manifest["files"]) == (12, 2, 4, 3)
    assert Ledger(job.output.path).is_complete()
    assert not contents(job, "_job/segments/*/*")
    assert not verify(job.output.path).problems


@pytest.mark.parametrize("damage", ["lost", "truncated"])
def test_its_plan_is_made_again(job: Job, damage: str) -> None:
    """Its records name neither pieces nor rules, and its units are cut as they were."""
    stored = load(out(job, "_job/plan.json"))
    if damage == "lost":
        out(job, "_job/plan.json").unlink()
    else:
        out(job, "_job/plan.json").write_bytes(out(job, "_job/plan.json").read_bytes()[:200])
    finished = contents(job, "part-*") | contents(job, "_job/units/*")
    _, generated = generate(job)
    assert generated == ["a.parquet#3", "a.parquet#5", "sub/c.parquet#0", "sub/c.parquet#1"]
    assert finished.items() <= (contents(job, "part-*") | contents(job, "_job/units/*")).items()
    record = load(out(job, "_job/plan.json"))
    assert {name: record[name] for name in ("fingerprint", "units", "rows", "files")} == {
        name: stored[name] for name in ("fingerprint", "units", "rows", "files")
    }
    assert not verify(job.output.path).problems


def test_new_records_have_the_form_of_the_old_ones(job: Job) -> None:
    """So that a version which knows no pieces can read, verify and resume the output as well."""
    generate(job)
    old = load(out(job, f"_job/units/{DONE[0]}.json"))
    assert {"file", "first_row", "rows", "size", "stamp"} < old.keys()
    for unit in (SAVED, OPEN):
        record = load(out(job, f"_job/units/{unit}.json"))
        assert record.keys() == old.keys()
        assert (record["file"], record["first_row"], record["rows"]) == UNITS[unit]
    for unit in UNITS:
        metadata = pq.read_metadata(out(job, f"part-{unit}.parquet")).metadata or {}
        record = from_json(metadata[RECORD_KEY.encode()])
        shared = load(out(job, f"_job/units/{unit}.json")).keys() & record.keys()
        assert {"unit", "file", "first_row", "rows", "size", "stamp"} < shared
        assert not record.keys() & {"pieces", "rules"}
        assert (record["file"], record["first_row"], record["rows"]) == UNITS[unit]


def test_a_new_segment_has_the_form_of_the_old_one(job: Job) -> None:
    plan = plan_of(job)
    [old] = out(job).glob(f"_job/segments/{SAVED}/*")
    unit = next(unit for unit in plan.units if unit.id == SAVED)
    store_of(job, plan).write_segment(unit, pq.read_table(old), writer="6" * 32, number=0, attempt=1)
    [new] = set(out(job).glob(f"_job/segments/{SAVED}/*")) - {old}
    records = [from_json((pq.read_metadata(path).metadata or {})[b"twotower.segment"]) for path in (old, new)]
    assert records[1] == {**records[0], "writer": "6" * 32}


@pytest.mark.parametrize("names", [["0"], ["b"], ["0", "b", "sub/bb", "z"]], ids=", ".join)
def test_it_is_extended_with_units_of_one_file(job: Job, names: list[str]) -> None:
    """Files that sort before, between or after the old ones get units of their own, with old ids for old units."""
    finished = contents(job, "part-*")
    for name in names:
        write(Path(job.input.path) / f"{name}.parquet", prompt=prompts(1))
    with pytest.raises(OutputError, match=r"set input\.on_change: extend"):
        open_ledger(job, plan_of(job))
    outcome, generated = generate(extending(job))
    added = [f"{name}.parquet#0" for name in names]
    assert generated == sorted([*added, "a.parquet#3", "a.parquet#5", "sub/c.parquet#0", "sub/c.parquet#1"])
    assert outcome.units == 4 + len(names)
    assert finished.items() <= contents(job, "part-*").items()
    assert len(rows_of(job)) == 12 + len(names)
    record = load(out(job, "_job/plan.json"))
    assert "packing" not in record
    assert (record["units"], record["rows"]) == (4 + len(names), 12 + len(names))
    assert not verify(job.output.path).problems


def test_without_rows_it_is_begun_again_by_the_rules_of_today(job: Job) -> None:
    """Nothing is lost then, and small files share a unit."""
    for path in [*out(job).glob("part-*"), *out(job).glob("_job/segments/*/*")]:
        path.unlink()
    write(Path(job.input.path) / "z.parquet", prompt=prompts(2))
    outcome, generated = generate(job)
    assert len(generated) == 12  # the other two rows have no prompt
    assert outcome.units == 4
    record = load(out(job, "_job/plan.json"))
    assert record["fingerprint"]["fields"]["work units"] == UNIT_RULES
    assert record["packing"] == ["0:0+3", "0:3+4", "1", "2-3"]
    assert len(rows_of(job)) == 14


def test_what_differs_between_an_old_output_and_a_job_of_today(job: Job) -> None:
    """A version that knows no field `work units` says it about an output of today, so the text must be short."""
    fields = plan_of(job).fingerprint.fields
    assert "work units" not in fields
    today = {**fields, "work units": UNIT_RULES}
    assert differences(today, fields) == [f"work units: {UNIT_RULES} -> null"]
    assert differences(fields, today) == [f"work units: null -> {UNIT_RULES}"]


def test_old_and_new_segments_of_a_unit_are_put_together(job: Job) -> None:
    """A row that both hold is taken from the one that comes first by name."""
    plan = plan_of(job)
    [old] = out(job).glob(f"_job/segments/{SAVED}/*")
    rows = pq.read_table(old)
    texts = pa.chunked_array([pa.array(["again"] * rows.num_rows)])
    newer = rows.set_column(rows.schema.get_field_index("completion"), "completion", texts)
    unit = next(unit for unit in plan.units if unit.id == SAVED)
    store = store_of(job, plan)
    store.write_segment(unit, newer, writer="6" * 32, number=0, attempt=2)
    saved = store.read_segments(unit)
    store.input.close()
    assert saved.ignored == ()
    assert saved.table["completion"].to_pylist() == list(SAVED_ROWS.values())
