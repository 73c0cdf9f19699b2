"""The unit runner with a fake engine over real Parquet: each row leaves once, the engine never waits for files."""

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError, EngineError
from model.params import GenerationParams
from pipeline.dataset import UnitData
from pipeline.dispatch import UnitDone, UnitFailed, dispatch
from pipeline.errors import JobFailed, OutputError
from pipeline.progress import LogProgress, Meter
from pipeline.retry import RetryPolicy
from pipeline.types import RowResult, UnitResult, WorkUnit
from tests.workers.fakes import TOO_LONG, FakeEngine, FakeMaker, FakeTokenizer
from tests.workers.jobs import SmallJob, open_job, prompts_of
from workers import build
from workers.build import PartStore
from workers.local_pool import LocalPool
from workers.replica import Replica
from workers.unit_runner import QUEUE_FACTOR, Outcome, UnitRunner


class SlowStore(PartStore):
    """A store whose readings and publications can be held up or made to fail."""

    def __init__(self, small: SmallJob) -> None:
        super().__init__(small.spec, "r0")
        self.gates: dict[str, threading.Event] = {}
        self.refuse: set[str] = set()

    def read(self, unit: WorkUnit) -> UnitData:
        if gate := self.gates.get(unit.id):
            assert gate.wait(20)
        return super().read(unit)

    def publish(self, data: UnitData, results: Sequence[RowResult], **times: Any) -> UnitResult:
        if data.unit.id in self.refuse:
            raise OutputError("the part is broken")
        return super().publish(data, results, **times)


def make_runner(small: SmallJob, engine: FakeEngine, store: PartStore | None = None) -> UnitRunner:
    store = store or PartStore(small.spec, "r0")
    params = GenerationParams()
    return UnitRunner(engine, FakeTokenizer(), store, params, replica="r0", max_rows=engine.max_rows)


def work_all(runner: UnitRunner) -> list[Outcome]:
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 30
    while runner.busy:
        assert time.monotonic() < deadline
        outcomes += runner.work(0.5)
    runner.close()
    return outcomes


def test_every_row_leaves_once_as_a_completion_or_an_error_row(tmp_path: Path) -> None:
    prompts: list[str | None] = [*prompts_of(10)]
    prompts[1], prompts[4], prompts[6], prompts[8] = None, "", "   ", "y" * (TOO_LONG + 5)
    small = open_job(tmp_path, prompts)
    runner = make_runner(small, FakeEngine())
    runner.add(small.plan.units[0], 2)
    [done] = work_all(runner)
    assert isinstance(done, UnitDone)
    assert (done.result.totals.rows, done.result.totals.errors, done.result.attempt) == (10, 4, 2)
    rows = small.rows()
    for row, prompt in zip(rows, prompts, strict=True):
        if row["finish_reason"] != "error":
            assert row["completion"] == prompt[::-1]
            assert row["prompt_tokens"] == len(prompt)
    errors = {row["source_row"]: row["error"] for row in rows if row["error"]}
    assert errors == {
        1: "prompt is null",
        4: "prompt is empty",
        6: "the prompt has no tokens",
        8: f"{TOO_LONG + 5} prompt tokens exceed {TOO_LONG}",
    }
    assert rows[8]["prompt_tokens"] == TOO_LONG + 5
    assert {(row["replica"], row["attempt"]) for row in rows} == {("r0", 2)}


def test_a_unit_of_error_rows_alone_is_published(tmp_path: Path) -> None:
    small = open_job(tmp_path, [None, "", "z" * (TOO_LONG + 1)])
    runner = make_runner(small, FakeEngine())
    runner.add(small.plan.units[0], 1)
    [done] = work_all(runner)
    assert isinstance(done, UnitDone)
    assert done.result.totals.errors == 3


def test_rows_go_longest_first_and_the_engine_queue_stays_short(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(200), rows_per_file=200)
    engine = FakeEngine(max_rows=4)
    runner = make_runner(small, engine)
    runner.add(small.plan.units[0], 1)
    work_all(runner)
    lengths = [len(prompts_of(200)[int(key.partition("#")[2])]) for key in engine.order]
    assert lengths == sorted(lengths, reverse=True)
    assert engine.most_waiting <= QUEUE_FACTOR * 4


def test_the_engine_does_not_drain_between_units(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(80), rows_per_file=20)
    engine = FakeEngine(max_rows=4, step_s=0.002)
    runner = make_runner(small, engine)
    waiting = list(small.plan.units)
    for _ in range(2):
        runner.add(waiting.pop(0), 1)
    while runner.busy:
        for _ in runner.work(0.5):
            if waiting:
                runner.add(waiting.pop(0), 1)
    assert len(small.rows()) == 80
    assert engine.short_steps <= 8, f"{engine.short_steps} of {engine.steps} steps had a free slot"


def test_reading_the_next_unit_does_not_hold_up_the_engine(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(20))
    store, (first, second) = SlowStore(small), small.plan.units
    gate = store.gates[second.id] = threading.Event()
    runner = make_runner(small, FakeEngine(), store)
    runner.add(first, 1)
    runner.add(second, 1)
    [done] = runner.work(10)
    assert isinstance(done, UnitDone)
    assert done.result.unit_id == first.id
    started = time.monotonic()
    assert runner.work(0.1) == []  # nothing to do but wait, and no longer than told
    assert 0.05 < time.monotonic() - started < 5
    threading.Timer(0.1, gate.set).start()
    [done] = runner.work(20)  # woken by the reader
    assert isinstance(done, UnitDone)
    assert done.result.unit_id == second.id
    assert time.monotonic() - started < 15
    runner.close()


def test_a_unit_cannot_be_in_twice(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10))
    runner = make_runner(small, FakeEngine())
    runner.add(small.plan.units[0], 1)
    with pytest.raises(ValueError, match=r"is already on replica r0"):
        runner.add(small.plan.units[0], 2)
    work_all(runner)
    runner.close()


def test_a_unit_that_cannot_be_read_or_published_fails_alone(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(30))
    store, units = SlowStore(small), small.plan.units
    gone = WorkUnit("gone", str(tmp_path / "in" / "gone.parquet"), "gone.parquet", 0, 10)
    store.refuse.add(units[1].id)
    runner = make_runner(small, FakeEngine(), store)
    for unit in (gone, *units):
        runner.add(unit, 1)
    outcomes = work_all(runner)
    failed = {outcome.unit.id: outcome.reason for outcome in outcomes if isinstance(outcome, UnitFailed)}
    assert failed.keys() == {"gone", units[1].id}
    assert "gone.parquet is gone" in failed["gone"]
    assert failed[units[1].id] == "the part is broken"
    assert len(small.rows()) == 20


def test_a_part_that_another_attempt_published_first_stays(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10))
    for attempt in (1, 2):
        runner = make_runner(small, FakeEngine())
        runner.add(small.plan.units[0], attempt)
        [done] = work_all(runner)
        assert isinstance(done, UnitDone)
        assert done.result.published_by_other == (attempt == 2)
    assert {row["attempt"] for row in small.rows()} == {1}


def test_progress_counts_from_the_units_start(tmp_path: Path) -> None:
    small = open_job(tmp_path, [None, *prompts_of(50)], rows_per_file=100)
    runner = make_runner(small, FakeEngine(max_rows=2, step_s=0.005))
    runner.add(small.plan.units[0], 1)
    seen = []
    while runner.busy:
        runner.work(0.02)
        seen += [(report.rows, report.errors, report.tokens) for report in runner.progress()]
    assert seen == sorted(seen)
    assert {errors for _, errors, _ in seen} == {1}
    assert len(seen) > 2
    runner.close()


def test_what_the_engine_raises_ends_the_replica_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = open_job(tmp_path, prompts_of(10))
    replica = Replica("r0", lambda _name: make_runner(small, FakeEngine(fail_at_step=2)))
    assert replica.start().fatal is None
    replica.assign(small.plan.units[0], 1)
    report = replica.work(10)
    assert (report.fatal, report.refused) == ("the forward failed", False)
    assert replica.work(1).fatal == "the forward failed"
    assert "EngineError: the forward failed" in capsys.readouterr().err


def test_a_unit_assigned_twice_ends_the_replica(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = open_job(tmp_path, prompts_of(10))
    replica = Replica("r0", lambda _name: make_runner(small, FakeEngine()))
    replica.start()
    for attempt in (1, 2):
        replica.assign(small.plan.units[0], attempt)
    assert "is already on replica r0" in (replica.work(1).fatal or "")
    assert "ValueError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text", "refused"),
    [
        (CheckpointError("shard 2 is missing"), "shard 2 is missing", True),
        (ZeroDivisionError("1/0"), "ZeroDivisionError: 1/0", False),
    ],
)
def test_what_start_up_raises_is_reported(
    error: Exception, text: str, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a traceback beside it only where it is a fault of ours."""

    def fail(_name: str) -> UnitRunner:
        raise error

    report = Replica("r0", fail).start()
    assert (report.fatal, report.refused) == (text, refused)
    assert ("Traceback" in capsys.readouterr().err) != refused


@pytest.mark.parametrize("engine", [{"kv_tokens": 10**15}, {"kv_tokens": 10**15, "max_rows": 7}])
def test_an_engine_too_large_for_memory_is_refused_by_name(tmp_path: Path, engine: dict[str, int]) -> None:
    small = open_job(tmp_path, prompts_of(1), engine=engine)
    report = Replica("r0", functools.partial(build.make_runner, small.spec)).start()
    assert report.refused
    assert report.fatal is not None
    rows = engine.get("max_rows", 16)
    assert f"engine.max_rows {rows} and engine.kv_tokens {10**15}; lower them" in report.fatal
    assert "\n" not in report.fatal


def test_more_cpus_than_there_are_make_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    small = open_job(tmp_path, prompts_of(1), workers={"gpus": 0, "cpus": 2**40})
    build.make_runner(small.spec, "r0").close()
    assert asked == [os.cpu_count()]


class UnluckyMaker(FakeMaker):
    """The engine of its first `lives` replicas fails after a few steps."""

    lives = 2

    def __call__(self, replica: str) -> UnitRunner:
        runner = super().__call__(replica)
        if self.lives:
            self.lives -= 1
            runner._engine.fail_at_step = 5  # type: ignore[attr-defined]
        return runner


def run_locally(small: SmallJob, pool: LocalPool, attempts: int = 3) -> dict[str, UnitResult]:
    progress = LogProgress(Meter(small.plan.rows), sys.stderr)
    try:
        return dispatch(small.plan.units, {}, pool, RetryPolicy(attempts, 0.1), threading.Event(), progress)
    finally:
        pool.close()


def test_local_pool_repeats_what_a_dead_engine_held(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(95))
    results = run_locally(small, LocalPool(UnluckyMaker(small.spec)))
    assert sum(result.totals.rows for result in results.values()) == 95
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(95)]
    assert max(result.attempt for result in results.values()) == 3


def test_local_pool_gives_up_after_the_attempts_allowed(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(20))
    with pytest.raises(JobFailed, match=r"failed 2 of 2 attempts .*: replica local-2 was lost: the forward failed"):
        run_locally(small, LocalPool(UnluckyMaker(small.spec)), attempts=2)


def test_local_pool_says_why_it_cannot_start(tmp_path: Path) -> None:
    def fail(_name: str) -> UnitRunner:
        raise CheckpointError("shard 2 is missing")

    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing"):
        run_locally(open_job(tmp_path, prompts_of(20)), LocalPool(fail))


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from tests.workers.fakes import FakeMaker
from tests.workers.jobs import open_job

small = open_job(Path(sys.argv[1]), ["word " * 30] * 60_000, rows_per_file=1000)
runner = FakeMaker(small.spec, max_rows=64)("r0")
waiting, done = list(small.plan.units), 0
while runner.busy or waiting:
    while waiting and len(runner._units) < 2:
        runner.add(waiting.pop(0), 1)
    done += len(runner.work(5))
    if done in (10, 60):
        print(done, int(Path("/proc/self/statm").read_text().split()[1]) * 4, flush=True)
        if done == 60:
            break
runner.close()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_units(tmp_path: Path) -> None:
    """Units of 1,000 rows hold about 1 MB each as they pass; 50 more of them may leave less than 2 MB behind."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    after = {int(units): int(kib) for units, kib in (line.split() for line in output.splitlines())}
    assert after[60] - after[10] < 2 << 10, f"KiB after so many units: {after}"


def test_engine_errors_keep_their_rows_through_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(EngineError("failed", keys=("a#1",))))
    assert (str(error), error.keys) == ("failed", ("a#1",))
