"""Tests of drivers that go on after another one took over, and of output folders that go away during a run."""

import functools
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import pipeline.driver.run
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed, OutputError, StorageError
from pipeline.core.events import Event
from pipeline.core.types import Totals
from pipeline.driver.run import run_job
from pipeline.maintenance.verify import verify
from pipeline.monitoring.live import LiveFile
from pipeline.output.begun import plan_job
from pipeline.output.claim import Claim
from pipeline.output.layout import JOB, LIVE, MANIFEST, SEGMENTS, SUCCESS, part_name
from pipeline.output.ledger import read_status
from pipeline.planning.checkpoint import check_checkpoint
from pipeline.planning.plan import Plan
from pipeline.storage import retrying
from pipeline.storage.storage import Storage
from tests.pipeline.cases import load, make_job, open_ledger, out, part_of, prompts, publish, store_of, write
from tests.pipeline.generation import generate
from tests.workers.fakes import FakeMaker
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool


@pytest.fixture
def job(tmp_path: Path) -> Job:
    for name in "ab":
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(4))
    return make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 4}, workers={"gpus": 0})


class Zombie:
    """A driver that has generated everything and stands just before the manifest."""

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, plan_job(job, check_checkpoint(job))
        self.ledger = open_ledger(job, self.plan)
        self.claim = Claim(job.output.path, check_s=0.01)
        self.claim.fingerprint = self.plan.fingerprint.digest
        self.totals = sum((result.totals for result in publish(job, self.plan)), Totals())

    def complete(self) -> None:
        self.ledger.complete(self.plan, self.job, self.totals, seconds=1.0, check=self.claim.check_now)


def take_over(job: Job, *, added: bool) -> Plan:
    """Let a newer driver claim the folder, with a further input file if `added` is true."""
    if added:
        write(Path(job.input.path) / "c.parquet", prompt=prompts(4))
        job = job.model_copy(update={"input": job.input.model_copy(update={"on_change": "extend"})})
    plan = plan_job(job, check_checkpoint(job))
    open_ledger(job, plan)
    Claim(job.output.path)
    return plan


def after_writing(name: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act once, right after the file of that name was written."""
    write_file = Storage.write

    def acting(self: Storage, written: str, data: bytes) -> None:
        write_file(self, written, data)
        if written == name:
            monkeypatch.setattr(Storage, "write", write_file)
            act()

    monkeypatch.setattr(Storage, "write", acting)


def test_a_driver_that_was_replaced_before_its_manifest_writes_none(job: Job) -> None:
    zombie = Zombie(job)
    take_over(job, added=True)
    with pytest.raises(JobFailed, match="another driver of this job took over"):
        zombie.complete()
    assert not out(job, MANIFEST).exists()
    assert not out(job, SUCCESS).exists()


@pytest.mark.parametrize("name", [MANIFEST, SUCCESS])
def test_a_driver_that_is_replaced_while_it_completes_leaves_no_success(
    job: Job, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer driver has more to do and is killed. The zombie's manifest stays, and counts for nothing."""
    zombie = Zombie(job)
    after_writing(name, lambda: take_over(job, added=True), monkeypatch)
    with pytest.raises(JobFailed, match="another driver of this job took over"):
        zombie.complete()
    assert not out(job, SUCCESS).exists()
    status = read_status(job.output.path)
    assert (status.complete, status.rows_done, status.rows_total) == (False, 8, 12)


def test_success_stays_if_the_job_is_complete_by_the_newer_drivers_plan_too(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job was submitted again at the end: nothing is left to do."""
    zombie = Zombie(job)
    after_writing(SUCCESS, lambda: take_over(job, added=False), monkeypatch)
    with pytest.raises(JobFailed):
        zombie.complete()
    assert read_status(job.output.path).complete
    assert not verify(job.output.path).problems


def test_success_of_a_newer_driver_that_has_written_its_manifest_stays(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = Zombie(job)

    def overtake() -> None:
        take_over(job, added=False)
        out(job, MANIFEST).write_text("{}")

    after_writing(SUCCESS, overtake, monkeypatch)
    with pytest.raises(JobFailed):
        zombie.complete()
    assert out(job, SUCCESS).exists()


def test_a_stale_success_and_manifest_do_not_count(job: Job) -> None:
    """A zombie left them over a folder in which a newer driver has published all but the manifest."""
    Zombie(job).complete()
    stale = [out(job, name).read_bytes() for name in (SUCCESS, MANIFEST)]
    plan = take_over(job, added=True)
    publish(job, plan, tuple(unit for unit in plan.units if not out(job, part_name(unit.id)).exists()))
    for name, data in zip((SUCCESS, MANIFEST), stale, strict=True):
        out(job, name).write_bytes(data)
    assert not read_status(job.output.path).complete
    outcome, generated = generate(job)
    assert (outcome.units, generated) == (3, [])
    assert load(out(job, MANIFEST))["rows"] == 12
    assert read_status(job.output.path).complete
    assert not verify(job.output.path).problems


def test_only_segments_of_the_own_plan_are_swept(job: Job) -> None:
    zombie = Zombie(job)
    own, other = (out(job, f"{SEGMENTS}/{unit}/x.parquet") for unit in (zombie.plan.units[0].id, "another-0"))
    for path in (own, other):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"rows")
    zombie.complete()
    assert not own.exists()
    assert other.exists()


def test_a_zombie_whose_folder_is_another_jobs_by_now_is_told_that(job: Job) -> None:
    """Its own part was moved away with all others, and the part that it finds is a live one."""
    zombie = Zombie(job)
    data = part_of(store_of(job, zombie.plan).input.read(zombie.plan.units[0]), zombie.plan)
    for part in out(job).glob("part-*"):
        part.unlink()
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4})})
    plan = take_over(other, added=False)
    publish(other, plan)
    store = store_of(job, zombie.plan)
    said = [
        *_refusals(
            lambda: store.publish(zombie.plan.units[0], data),
            lambda: store.published(zombie.plan.units[0]),
            lambda: zombie.ledger.finished(zombie.plan),
            lambda: zombie.ledger.complete(zombie.plan, job, zombie.totals, seconds=1.0),
            zombie.complete,
        )
    ]
    assert len(said) == 5
    for text in said:
        assert f"output {job.output.path} belongs to another job by now" in text
        assert "this driver ends" in text
        assert "delete" not in text
        assert "move" not in text


def _refusals(*calls: Callable[[], object]) -> Sequence[str]:
    said = []
    for call in calls:
        with pytest.raises((OutputError, JobFailed)) as caught:
            call()
        said.append(str(caught.value))
    return said


# The folder goes away


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the claim often, and do not try failing writes for long."""
    monkeypatch.setattr(pipeline.driver.run, "Claim", functools.partial(Claim, check_s=0.01))
    monkeypatch.setattr(retrying, "LOCAL_PATIENCE_S", 0.05)


class Moving(LocalPool):
    """A pool that acts once, when the first rows are finished."""

    act: Callable[[], object]
    acted = False

    def wait(self, timeout_s: float) -> Sequence[Event]:
        if not self.acted:
            self.acted = True
            self.act()
        return super().wait(timeout_s)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("how", ["deleted", "renamed", "unmounted"])
def test_a_run_ends_when_its_output_folder_goes_away_and_creates_nothing(job: Job, tmp_path: Path, how: str) -> None:
    def go() -> None:
        out(job).rename(tmp_path / "away")  # at one moment, while the driver's threads write to it
        if how == "deleted":
            shutil.rmtree(tmp_path / "away")
        if how == "unmounted":  # the folder below the mount point is empty
            out(job).mkdir()

    def make_pool(plan: Plan, _units: int, _tell: Callable[[str], None]) -> LocalPool:
        pool = Moving(FakeMaker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)))
        pool.act = go
        return pool

    with pytest.raises(JobFailed, match="removed or moved") as caught:
        run_job(job, make_pool, threading.Event())
    assert "\n" not in str(caught.value)
    assert not (list(out(job).iterdir()) if out(job).exists() else [])
    assert out(job).exists() == (how == "unmounted")


@pytest.mark.usefixtures("hasty")
def test_nothing_that_writes_to_an_output_creates_it_anew(job: Job) -> None:
    zombie = Zombie(job)
    unit = zombie.plan.units[0]
    store = store_of(job, zombie.plan)
    data = part_of(store.input.read(unit), zombie.plan)
    live = LiveFile(job.output.path)
    shutil.rmtree(out(job))
    with pytest.raises(StorageError, match="_job was removed or moved"):
        store.publish(unit, data)
    with pytest.raises(JobFailed, match="the output folder was removed or moved"):
        zombie.complete()
    with pytest.raises(StorageError, match="_job was removed or moved"):
        zombie.ledger.complete(zombie.plan, job, zombie.totals, seconds=1.0)
    live._storage.kind()
    with pytest.raises(StorageError):
        live._storage.write(LIVE, b"{}")
    assert not out(job).exists()


def test_folders_below_the_output_are_created(tmp_path: Path) -> None:
    (tmp_path / JOB).mkdir()
    storage = Storage(str(tmp_path), anchor=JOB)
    assert storage.create("_job/segments/u/a.parquet", b"x")
    storage.write("part-u.parquet", b"x")
    assert not storage.create("_job/segments/u/a.parquet", b"y")
    assert (tmp_path / "_job/segments/u/a.parquet").read_bytes() == b"x"
