"""Tests of runs with input that cannot be read: all other rows are finished, and a new run tries only what is
missing."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from pipeline.driver.run import Outcome, run_job
from pipeline.driver.set_aside import SetAsideError
from pipeline.maintenance.verify import verify
from pipeline.monitoring.progress import LineDisplay
from pipeline.planning.plan import Plan
from tests.workers.jobs import prompts_of, write_prompts
from tests.workers.units.engines import MarkedMaker, finished_rows
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool

FILES, ROWS = 12, 4
BAD = 7
"""The number of the file that is damaged."""


def make_job(folder: Path, **sections: Any) -> Job:
    """Write small files, which share units of 24 rows, and one large file with a unit of its own."""
    for number in range(FILES):
        prompts = [f"{number:02}-{prompt}" for prompt in prompts_of(ROWS)]
        write_prompts(folder / "in" / f"{number:02}.parquet", prompts)
    write_prompts(folder / "in" / "large.parquet", prompts_of(40))
    return Job.model_validate(
        {
            "name": "small",
            "input": {"path": str(folder / "in")},
            "output": {"path": str(folder / "out"), "rows_per_file": 24},
            "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
            "workers": {"gpus": 0},
            **sections,
        }
    )


def damage(file: Path) -> Callable[[], None]:
    """Damage the data of the file and keep its size, its time and its footer. Return a function that repairs it."""
    good, stat = file.read_bytes(), file.stat()

    def write(data: bytes) -> None:
        file.write_bytes(data)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    write(good[:4] + b"\xff" * 40 + good[44:])
    return lambda: write(good)


def submit(job: Job, pools: list[LocalPool] | None = None) -> Outcome:
    """Run the job with a fake engine in this process. The pool that it makes is added to `pools`."""

    def make_pool(plan: Plan, *_: Any) -> LocalPool:
        spec = ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)
        made = LocalPool(MarkedMaker(spec))
        ([] if pools is None else pools).append(made)
        return made

    with Path(job.input.path).with_name("log").open("a") as log:
        return run_job(job, make_pool, threading.Event(), lambda: LineDisplay(log))


@pytest.mark.slow
def test_only_the_file_that_cannot_be_read_is_missing(tmp_path: Path) -> None:
    """Its unit has eleven other files' rows in segments, all other units are published, and the error names the file.
    The next run tries to read it, and loads no model for that. Once the file is repaired, only its rows are
    generated."""
    job, pools = make_job(tmp_path), list[LocalPool]()
    repair = damage(tmp_path / "in" / f"{BAD:02}.parquet")
    named = rf"1 of 4 units .* 4 rows cannot be read: {BAD:02}\.parquet, rows 0 to 3 of unit "
    with pytest.raises(SetAsideError, match=named):
        submit(job)
    out = tmp_path / "out"
    assert len(finished_rows(tmp_path)) == (FILES - 1) * ROWS + 40
    assert len(list(out.glob("part-*.parquet"))) == 3
    assert not (out / "_SUCCESS").exists()
    [known] = json.loads((out / "_job" / "set_aside.json").read_text())["ranges"]
    assert (known["first"], known["end"]) == (4, 8)
    assert "is set aside" in (tmp_path / "log").read_text()

    [found] = verify(str(out)).problems
    assert "_job/set_aside.json names rows that the last run could not read" in found
    with pytest.raises(SetAsideError, match=named):
        submit(job, pools)
    assert not pools
    assert len(finished_rows(tmp_path)) == (FILES - 1) * ROWS + 40

    repair()
    outcome = submit(job, pools)
    assert (outcome.totals.rows, outcome.totals.errors, len(pools)) == (FILES * ROWS + 40, 0, 1)
    done = finished_rows(tmp_path)
    assert len(done) == len(set(done)) == FILES * ROWS + 40
    assert (out / "_SUCCESS").exists()
    assert not (out / "_job" / "set_aside.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("span", [(4, 4), (8, 4), (24, 24), (4, 10**9), (-4, 8)])
def test_a_damaged_record_of_what_is_set_aside_changes_nothing(tmp_path: Path, span: tuple[int, int]) -> None:
    """A record with ranges that no unit has is left out, and the replica finds what cannot be read."""
    job = make_job(tmp_path)
    damage(tmp_path / "in" / f"{BAD:02}.parquet")
    with pytest.raises(SetAsideError):
        submit(job)
    file = tmp_path / "out" / "_job" / "set_aside.json"
    record = json.loads(file.read_text())
    record["ranges"][0].update(first=span[0], end=span[1])
    file.write_text(json.dumps(record))
    with pytest.raises(SetAsideError, match=r"4 rows cannot be read: 07\.parquet, rows 0 to 3 of unit "):
        submit(job)


def test_a_large_file_that_cannot_be_read_loses_only_its_own_units(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    damage(tmp_path / "in" / "large.parquet")
    with pytest.raises(SetAsideError, match=r"rows cannot be read: large\.parquet, rows "):
        submit(job)
    assert {key for key in finished_rows(tmp_path) if not key.startswith("large")} == {
        f"{number:02}.parquet#{row}" for number in range(FILES) for row in range(ROWS)
    }


def test_a_job_may_ask_to_end_at_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, retry={"on_bad_unit": "fail"})
    damage(tmp_path / "in" / f"{BAD:02}.parquet")
    with pytest.raises(JobFailed, match=r"failed 3 of 3 attempts \(retry\.attempts\); the last time: input .*07\.parq"):
        submit(job)
    assert not (tmp_path / "out" / "_job" / "set_aside.json").exists()


def die(*_: object) -> str:
    os._exit(3)


@pytest.mark.slow
def test_a_file_that_ends_the_process_that_reads_it_does_not_end_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path)
    damage(tmp_path / "in" / f"{BAD:02}.parquet")
    with pytest.raises(SetAsideError):
        submit(job)
    monkeypatch.setattr("pipeline.driver.set_aside._read", die)
    with pytest.raises(SetAsideError, match="reading it ended the process"):
        submit(job)
