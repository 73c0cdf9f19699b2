"""Tests of `clean`: it removes what dead runs have left behind, and nothing else."""

import os
import time
import uuid
from pathlib import Path

import pytest

import pipeline.maintenance.clean
from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.types import WorkUnit
from pipeline.maintenance.clean import find_leftovers, remove_leftovers
from pipeline.maintenance.inventory import Inventory, list_inventory
from pipeline.maintenance.verify import verify
from pipeline.output.ledger import Ledger
from pipeline.output.part import result_table
from pipeline.output.unit_store import UnitStore
from pipeline.planning.plan import Plan
from pipeline.storage.storage import Storage
from tests.pipeline.cases import (
    complete_row,
    make_job,
    open_ledger,
    plan_of,
    prompts,
    publish,
    store_of,
    with_piece,
    write,
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Make a job over 25 rows in three units."""
    write(tmp_path / "in/a.parquet", prompt=prompts(25))
    return make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 10})


def files_of(job: Job) -> dict[str, bytes]:
    out = Path(job.output.path)
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def add(job: Job, name: str, age_s: float = 0.0) -> str:
    path = Path(job.output.path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    os.utime(path, (time.time() - age_s,) * 2)
    return name


def add_segment(job: Job, store: UnitStore, unit: WorkUnit) -> str:
    """Write a real segment with five of the unit's rows, and return its name."""
    before = files_of(job)
    rows = result_table(unit, [complete_row(row) for row in store.input.read(with_piece(unit, size=-1)).rows[:5]])
    store.input.close()
    store.write_segment(unit, rows, writer=uuid.uuid4().hex, number=1, attempt=1)
    [name] = files_of(job).keys() - before.keys()
    return name


def begun(job: Job) -> Plan:
    """Begin the job: publish two of its three units. Return the plan."""
    plan = plan_of(job)
    open_ledger(job, plan)
    publish(job, plan, plan.units[:2])
    return plan


def test_leftovers_go_and_all_else_stays(job: Job) -> None:
    plan = begun(job)
    other = store_of(job, plan, "f" * 64)
    hidden = f".{plan.units[0].id}.json.{'0' * 32}.tmp"
    goes = {
        add_segment(job, store_of(job, plan), plan.units[0]),
        add_segment(job, other, plan.units[2]),
        add_segment(job, store_of(job, plan), with_piece(plan.units[2], stamp="mtime:1")),
        add(job, f"_job/units/{hidden}", age_s=4000),
        add(job, "_writable"),
        add(job, "_job/drivers/1.json"),
        add(job, "_job/drivers/9.json"),
    }
    stays = {
        add_segment(job, store_of(job, plan), plan.units[2]),
        add(job, f"_job/segments/{plan.units[2].id}/broken.parquet"),
        add(job, f"_job/units/{hidden.replace('0', '1')}", age_s=60),
        add(job, "_job/drivers/10.json"),
        add(job, "notes.txt", age_s=9000),
        add(job, ".mine.tmp", age_s=9000),
        add(job, "part-of-mine.parquet"),
        f"part-{plan.units[0].id}.parquet",
        f"_job/units/{plan.units[0].id}.json",
        "_job/plan.json",
    }
    before = files_of(job)
    assert before.keys() >= goes | stays
    leftovers = find_leftovers(job.output.path)
    assert files_of(job) == before  # looking removes nothing
    assert {file.name for leftover in leftovers for file in leftover.files} == goes
    lines = [leftover.line() for leftover in leftovers]
    assert [line.partition(",")[0] for line in lines] == [
        "segments of finished units (1 file",
        "segments of another job (2 files",
        "temporary files (2 files",
        "driver claims (2 files",
    ]
    assert lines[-1] == "driver claims (2 files, 10 bytes): _job/drivers/1.json and 1 more"
    remove_leftovers(job.output.path, leftovers)
    assert files_of(job) == {name: data for name, data in before.items() if name not in goes}
    assert find_leftovers(job.output.path) == []
    remove_leftovers(job.output.path, leftovers)  # files that are gone already are no error


def test_after_clean_verify_has_nothing_to_say(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    publish(job, plan)
    ledger.complete(plan, job, verify(job.output.path).totals, seconds=1.0)
    add(job, f"_job/segments/{plan.units[0].id}/late.parquet")
    add(job, f".part-{plan.units[0].id}.parquet.{'a' * 32}.tmp")  # nothing writes to a complete job any more
    assert len(verify(job.output.path).problems) == 2
    remove_leftovers(job.output.path, find_leftovers(job.output.path))
    assert verify(job.output.path).problems == ()
    assert Ledger(job.output.path).is_complete()


def test_segments_of_a_run_that_takes_more_files_meanwhile_stay(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run replaces the plan and writes segments of a new file while `clean` looks."""
    begun(job)
    late = []

    def list_late(storage: Storage) -> Inventory:
        write(Path(job.input.path) / "b.parquet", prompt=prompts(9))
        extending = job.model_copy(update={"input": job.input.model_copy(update={"on_change": "extend"})})
        longer = plan_of(extending)
        open_ledger(extending, longer)
        late.append(add_segment(job, store_of(job, longer), longer.units[-1]))
        return list_inventory(storage)

    monkeypatch.setattr(pipeline.maintenance.clean, "list_inventory", list_late)
    assert [file.name for leftover in find_leftovers(job.output.path) for file in leftover.files] == []
    assert late[0] in files_of(job)


def test_a_folder_that_is_no_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "_writable").write_bytes(b"")
    with pytest.raises(OutputError, match="is not a job's output"):
        find_leftovers(str(tmp_path))
