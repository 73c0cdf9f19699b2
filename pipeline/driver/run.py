"""One job from its settings to its manifest. Nothing is written before all that can be checked here is checked."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import TwoTowerError
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from pipeline.core.events import Event, ReplicaNote
from pipeline.core.types import Totals, UnitResult
from pipeline.driver.dispatcher import Pool, dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.stall import StallWatch
from pipeline.driver.work_queue import WorkQueue
from pipeline.monitoring.efficiency import slow_replicas
from pipeline.monitoring.live import COMPLETE, LiveFile
from pipeline.monitoring.meter import Meter
from pipeline.monitoring.progress import ShownProgress, open_progress
from pipeline.monitoring.telemetry import Sink, Watch
from pipeline.output.claim import Claim
from pipeline.output.ledger import Ledger
from pipeline.planning.checkpoint import check_checkpoint
from pipeline.planning.plan import Plan, make_plan
from pipeline.report.write import report_line

PoolMaker = Callable[[Plan, int, Callable[[str], None]], Pool]
"""Makes the pool for a plan with so many units left; the last argument shows a message to the operator."""
ProgressMaker = Callable[[Meter], ShownProgress]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job that is complete."""

    totals: Totals
    units: int
    ran_units: int
    """Of them, those that this run did; 0: the job was complete before."""
    tokens: int
    """Completion tokens that this run generated."""
    seconds: float
    """Wall clock of this run, loading and planning included."""
    manifest: dict[str, Any] | None
    """None where the job was complete before."""
    warnings: tuple[str, ...] = ()
    """Those of the manifest."""
    report: str = ""
    """Where report.html is, or why it was not written; "" where the job was complete before."""


def run_job(
    job: Job,
    make_pool: PoolMaker,
    stop: threading.Event,
    make_progress: ProgressMaker = open_progress,
    sinks: Sequence[Sink] = (),
) -> Outcome:
    """Runs what is left of a job and completes it. Setting `stop` ends it soon, with JobFailed. `sinks` get a picture
    of the run every few seconds.

    Raises JobError, RequestError, CheckpointError, InputError, OutputError and StorageError before anything is
    written; then JobFailed and ClusterError, with the finished parts in place.
    """
    started = time.monotonic()
    plan = make_plan(job, checkpoint_identity=check_checkpoint(job).identity())
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    ledger.open(plan, job)
    # First of all, so that a run before this one soon finishes nothing more; but a complete job is left as it is.
    claim = None if ledger.is_complete() else Claim(job.output.path)
    results = ledger.finished(plan)
    ran_units = len(plan.units) - len(results)
    if not ran_units and ledger.is_complete() and ledger.finished_at() is not None:
        totals = sum((result.totals for result in results.values()), Totals())
        return Outcome(totals, len(plan.units), 0, 0, time.monotonic() - started, None, ledger.warnings())
    claim = claim or Claim(job.output.path)
    meter = Meter(plan.rows, results.values())
    policy = RetryPolicy(job.retry.attempts, job.retry.max_error_rate)
    told: dict[str, str] = {}
    with contextlib.ExitStack() as closing:
        if ran_units:
            ledger.reopen()
            progress = make_progress(meter)
            watch = _watch(job, plan, meter, len(results), sinks, progress.tell)
            closing.enter_context(_ending(watch, claim))
            run = _Run(plan, policy, StallWatch(60 * job.retry.stall_minutes), claim, stop, told, watch)
            with claim:
                results = run.generate(results, make_pool, progress)
        else:  # the manifest alone is missing
            WorkQueue(plan.units, results, policy).check_end()
        totals = sum((result.totals for result in results.values()), Totals())
        claim.check_now()
        # What replicas told a driver that died is not known here, but their parts are.
        warnings = [f"replica {replica}: {text}" for replica, text in told.items()]
        warnings += slow_replicas(job, results.values(), but=told)
        manifest = ledger.complete(plan, job, totals, seconds=time.monotonic() - started, warnings=warnings)
    seconds, report = time.monotonic() - started, report_line(job.output.path)
    return Outcome(totals, len(plan.units), ran_units, meter.tokens, seconds, manifest, tuple(warnings), report)


def _watch(
    job: Job, plan: Plan, meter: Meter, finished: int, sinks: Sequence[Sink], tell: Callable[[str], None]
) -> Watch:
    return Watch(
        meter,
        LiveFile(job.output.path),
        fingerprint=plan.fingerprint.digest,
        units=finished,
        total_units=len(plan.units),
        sinks=sinks,
        tell=tell,
    )


@contextlib.contextmanager
def _ending(watch: Watch, claim: Claim) -> Iterator[None]:
    """Tells the watch how the run ended."""
    try:
        yield
    except BaseException as error:
        said = " ".join(str(error).split())
        ended = said if isinstance(error, TwoTowerError) else f"{type(error).__name__}: {said}"
        try:
            claim.check()
        except JobFailed:  # live.json is the newer driver's
            watch.close(None)
        else:
            watch.close(ended)
        raise
    watch.close(COMPLETE)


@dataclass(frozen=True, slots=True)
class _Run:
    """What goes into generating, but for the pool."""

    plan: Plan
    policy: RetryPolicy
    stall: StallWatch
    claim: Claim
    stop: threading.Event
    told: dict[str, str]
    """What replicas warn of, by their names; it is added to."""
    watch: Watch

    def generate(
        self, finished: dict[str, UnitResult], make_pool: PoolMaker, progress: ShownProgress
    ) -> dict[str, UnitResult]:
        """Runs the units that are not finished; whatever happens, the pool and the progress line are closed."""

        def hear(event: Event | None) -> None:
            progress(event)
            self.watch(event)
            if isinstance(event, ReplicaNote) and event.warning is not None:
                self.told[event.replica] = event.warning
            self.claim.check()

        with contextlib.ExitStack() as closing:
            closing.callback(progress.close)
            pool = make_pool(self.plan, len(self.plan.units) - len(finished), progress.tell)
            closing.callback(pool.close)
            return dispatch(self.plan.units, finished, pool, self.policy, self.stop, hear, self.stall)
