"""Runs one job from its settings to its manifest and its report. Everything that the driver can check without a loaded
model is checked before anything is written."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import TwoTowerError
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from pipeline.core.events import Event, ReplicaNote, SlotLeftOut
from pipeline.core.text import one_line
from pipeline.core.types import Totals, UnitResult
from pipeline.driver.dispatcher import Pool, dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.set_aside import SetAsideError, Unread, still_unread, write_unread
from pipeline.driver.stall import StallWatch
from pipeline.driver.work_queue import WorkQueue
from pipeline.monitoring.efficiency import slow_replicas
from pipeline.monitoring.live import COMPLETE, LiveFile
from pipeline.monitoring.progress import Display, open_display, run_progress, show_run
from pipeline.monitoring.reporter import Reporter, Sink
from pipeline.monitoring.telemetry import Telemetry
from pipeline.output.begun import OLD_RULES_NOTE, plan_job
from pipeline.output.claim import Claim
from pipeline.output.ledger import Ledger
from pipeline.planning.checkpoint import check_checkpoint
from pipeline.planning.plan import Plan
from pipeline.prompts.setup import RULES
from pipeline.report.write import report_line

PoolMaker = Callable[[Plan, int, Callable[[str], None]], Pool]
"""A function that makes the pool. Its arguments are the plan, the number of units left, and a function that shows a
message to the operator."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run that completed its job, or that found it complete."""

    totals: Totals
    """The counts of all rows of the job."""
    units: int
    """The number of units of the job."""
    ran_units: int
    """The number of units that were left when this run began; 0 if all were done before."""
    tokens: int
    """The number of completion tokens that this run generated."""
    seconds: float
    """Wall-clock seconds of this run, including planning and the loading of the model, but not the report."""
    manifest: dict[str, Any] | None
    """The content of the manifest; None if the job was complete before."""
    warnings: tuple[str, ...] = ()
    """The warnings in the manifest."""
    report: str = ""
    """The path or URL of report.html, or the reason why it was not written; "" if the job was complete before."""


def run_job(
    job: Job,
    make_pool: PoolMaker,
    stop: threading.Event,
    make_display: Callable[[], Display] = open_display,
    sinks: Sequence[Sink] = (),
) -> Outcome:
    """Run what is left of a job and complete it. If `stop` is set, the run ends soon with JobFailed.

    `make_pool` and `make_display` are called only if units are left. The `sinks` receive the state of the run every few
    seconds.

    Raises JobError, RequestError, CheckpointError and InputError before anything is written, JobFailed and ClusterError
    later, with the finished parts in place, and OutputError and StorageError at any time.
    """
    started = time.monotonic()
    plan = plan_job(job, check_checkpoint(job))
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    ledger.open(plan, job)
    # Claim before the parts are listed, so that an older run soon stops adding some; leave a complete job alone.
    last = ledger.completed(plan)
    claim = Claim(job.output.path) if last is None else None
    ledger.confirm_plan(plan, job)  # a run that began at the same time may have replaced the plan before the claim
    results = ledger.finished(plan)
    ran_units = len(plan.units) - len(results)
    if not ran_units and last is not None and last.finished is not None:
        totals = sum((result.totals for result in results.values()), Totals())
        return Outcome(totals, len(plan.units), 0, 0, time.monotonic() - started, None, last.warnings)
    claim = claim or Claim(job.output.path)
    claim.fingerprint = plan.fingerprint.digest
    telemetry = Telemetry(plan.rows, results.values(), total_units=len(plan.units), fingerprint=plan.fingerprint.digest)
    policy = RetryPolicy(job.retry.attempts, job.retry.max_error_rate, job.retry.on_bad_unit)
    told: dict[str, str] = {}
    with contextlib.ExitStack() as closing:
        if ran_units:
            ledger.reopen()
            display = make_display()
            if plan.prompts.rules < RULES:
                display.tell(OLD_RULES_NOTE)
            reporter = Reporter(telemetry, LiveFile(job.output.path), sinks, display.tell)
            closing.enter_context(_ending(reporter, claim))
            stall = StallWatch(telemetry, 60 * job.retry.stall_minutes)
            unread = still_unread(job, plan, [unit for unit in plan.units if unit.id not in results])
            run = _Run(plan, policy, stall, claim, stop, told, telemetry, display, reporter)
            with claim:
                try:
                    results = run.generate(results, make_pool, unread)
                except SetAsideError as error:
                    write_unread(job, plan, error.unread)
                    raise
        else:  # only the manifest is missing
            WorkQueue(plan.units, results, policy).check_end()
        totals = sum((result.totals for result in results.values()), Totals())
        # Warnings that went to an earlier driver which died are lost; slow_replicas derives them from the parts.
        warnings = [f"replica {replica}: {text}" for replica, text in told.items()]
        warnings += slow_replicas(job, results.values(), but=told)
        took = time.monotonic() - started
        manifest = ledger.complete(plan, job, totals, seconds=took, warnings=warnings, check=claim.check_now)
    seconds, report = time.monotonic() - started, report_line(job.output.path)
    return Outcome(totals, len(plan.units), ran_units, telemetry.tokens, seconds, manifest, tuple(warnings), report)


@contextlib.contextmanager
def _ending(reporter: Reporter, claim: Claim) -> Iterator[None]:
    """When the `with` block ends, tell the reporter how the run ended: COMPLETE, or the text of the error.

    If another driver has taken over the job, the reporter only closes, so that the other driver's live.json stays. It
    also does if the output folder is gone.
    """
    try:
        yield
    except BaseException as error:
        said = one_line(error)
        ended = said if isinstance(error, TwoTowerError) else f"{type(error).__name__}: {said}"
        try:
            claim.check()
        except JobFailed:  # another driver has taken over, and live.json is now that one's, or the folder is gone
            reporter.close(None)
        else:
            reporter.close(ended)
        raise
    reporter.close(COMPLETE)


@dataclass(frozen=True, slots=True)
class _Run:
    """The part of a run that has the missing units generated.

    Its fields are what `generate` works with, and `told`, which `generate` fills. The pool is not among them:
    `generate` makes and closes it.
    """

    plan: Plan
    policy: RetryPolicy
    stall: StallWatch
    claim: Claim
    stop: threading.Event
    told: dict[str, str]
    """The last warning of each replica, by its name; `generate` fills it."""
    telemetry: Telemetry
    display: Display
    reporter: Reporter

    def generate(self, finished: dict[str, UnitResult], make_pool: PoolMaker, unread: Unread) -> dict[str, UnitResult]:
        """Make the pool, run the units that are not in `finished`, and return the results of all units by unit id.

        `unread`: the rows that cannot be read. If nothing else is left, no pool is made. The pool and the display are
        closed in any case, the display after a last progress line. Raises what `dispatch` raises.
        """
        with contextlib.ExitStack() as closing:
            closing.callback(self.display.close)
            closing.callback(lambda: self.display.show(run_progress(self.telemetry.snapshot())))
            show_run(self.display, self.telemetry, None)  # so that progress is shown while the pool starts
            if len(finished) + len(unread) == len(self.plan.units):
                WorkQueue(self.plan.units, finished, self.policy, unread).check_end()
            pool = make_pool(self.plan, len(self.plan.units) - len(finished), self.display.tell)
            closing.callback(pool.close)
            return dispatch(self.plan.units, finished, pool, self.policy, self.stop, self._hear, self.stall, unread)

    def _hear(self, event: Event | None) -> None:
        self.telemetry.take(event)
        show_run(self.display, self.telemetry, event)
        if event is None:
            self.reporter.turn()
        if isinstance(event, ReplicaNote) and event.warning is not None:
            self.told[event.replica] = event.warning
        if isinstance(event, SlotLeftOut) and event.reason:
            self.told[event.slot] = event.reason
        self.claim.check()
