"""Runs the real dispatcher over many simulated replicas, to measure the driver's time per unit and the spread of units.

The replicas run on a virtual clock. The clock jumps to the next event; while the driver computes, it advances by the
processor time that the driver takes. So whatever waits for the driver waits as long as in a real job, and other
processes on the machine do not count. Replicas report like those of workers.cluster.pool: at the end of a unit and
every two seconds. Ray itself is not involved.
"""

import heapq
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.core.events import Event, ReplicaActive, ReplicaReady, UnitDone, UnitProgress
from pipeline.core.types import Assignment, Totals, UnitResult, WorkUnit
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.stall import StallWatch
from pipeline.monitoring.progress import LineDisplay, show_run
from pipeline.monitoring.telemetry import Telemetry
from tests.benchmarks.pipeline_results import Dispatched
from tests.pipeline.cases import one_piece

REPLICAS, UNITS = 256, 50_000
UNITS_PER_S = 100
ROWS, TOKENS = 100, 12_800  # per unit
MAX_ROWS = 16
"""The row limit of a replica's engine."""
REPORT_S = 2.0
"""Seconds between reports of a replica: workers.cluster.pool.WORK_S, not imported because Ray would then count in the
driver's memory."""
SPREAD, SURPRISE = 0.4, 0.1
"""Standard deviations (natural logarithms): SPREAD of units' expected work, SURPRISE of their seconds around it."""


@dataclass(slots=True)
class _Replica:
    held: list[WorkUnit] = field(default_factory=list)
    """Units assigned to the replica, which works on the first one."""
    began: float = 0.0
    beats: int = 0


class VirtualPool:
    """Implements pipeline.driver.dispatcher.Pool on a virtual clock. `seconds`: how long each unit takes, by its id."""

    def __init__(self, replicas: int, seconds: dict[str, float]) -> None:
        self.now = self.driver_s = 0.0
        self.handovers: list[float] = []
        self._seconds = seconds
        # By replica: the times at which units ended since the driver last looked. At the end of a job, the driver may
        # leave a replica that has enough work without a new unit; that is no handover.
        self._freed: dict[str, list[float]] = {}
        self._replicas = {f"r{number}": _Replica() for number in range(replicas)}
        self._coming = [(0.0, number, name, "ready") for number, name in enumerate(self._replicas)]
        self._number = replicas  # a counter of events, which keeps events of equal time in order
        self._mark = time.thread_time()

    def assign(self, replica: str, work: Assignment) -> None:
        """See Pool."""
        self._driver_stops()
        state = self._replicas[replica]
        if freed := self._freed.get(replica):
            self.handovers.append(self.now - freed.pop(0))
        state.held.append(work.unit)
        if len(state.held) == 1:
            self._begin(replica, self.now)
        self._mark = time.thread_time()

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """See Pool."""
        self._driver_stops()
        self.now = max(self.now, min(self._coming[0][0], self.now + timeout_s))
        self._freed.clear()
        events: list[Event] = []
        while self._coming and self._coming[0][0] <= self.now:
            at, _, name, what = heapq.heappop(self._coming)
            events += self._happen(name, what, at)
        self._mark = time.thread_time()
        return events

    def drop(self, replica: str, reason: str) -> None:
        """See Pool."""
        raise AssertionError(f"{replica} is dropped: {reason}")

    def close(self) -> None:
        """See Pool."""

    def _driver_stops(self) -> None:
        spent = time.thread_time() - self._mark
        self.now += spent
        self.driver_s += spent

    def _happen(self, name: str, what: str, at: float) -> list[Event]:
        state = self._replicas[name]
        state.beats += 1
        if what == "ready":
            return [ReplicaReady(name, MAX_ROWS)]
        active = ReplicaActive(name, state.beats, f"unit {state.held[0].id}: {ROWS} rows in the engine")
        if what == "report":
            self._plan_report(name, at)
            return [*self._progress(name, at), active]
        unit = state.held.pop(0)
        self._freed.setdefault(name, []).append(at)
        if state.held:
            self._begin(name, at)
        totals = Totals(rows=ROWS, ok=ROWS, completion_tokens=TOKENS, finish_reasons={"stop": ROWS})
        result = UnitResult(unit.id, totals, self._seconds[unit.id], "0" * 64, name, 1)
        return [*self._progress(name, at), UnitDone(result), active]

    def _progress(self, name: str, at: float) -> list[UnitProgress]:
        state = self._replicas[name]
        shares = [(at - state.began) / self._seconds[unit.id] if unit is state.held[0] else 0.0 for unit in state.held]
        return [
            UnitProgress(name, (unit.id, None), int(ROWS * share), 0, int(TOKENS * share))
            for unit, share in zip(state.held, shares, strict=True)
        ]

    def _begin(self, name: str, at: float) -> None:
        state = self._replicas[name]
        state.began = at
        self._plan_report(name, at)

    def _plan_report(self, name: str, at: float) -> None:
        state = self._replicas[name]
        end = state.began + self._seconds[state.held[0].id]
        what = "end" if end <= at + REPORT_S else "report"
        self._number += 1
        heapq.heappush(self._coming, (min(end, at + REPORT_S), self._number, name, what))


def make_work(units: int, replicas: int, *, seed: int = 0) -> tuple[list[WorkUnit], dict[str, float]]:
    """Return units with log-normal expected work, and the real seconds of each by its id, scaled so that the replicas
    end UNITS_PER_S units per second."""
    rng = np.random.default_rng(seed)
    expected = np.exp(rng.normal(0.0, SPREAD, units))
    seconds = expected * np.exp(rng.normal(0.0, SURPRISE, units))
    seconds *= replicas / UNITS_PER_S / seconds.mean()
    names = [f"{number:012x}-{0:010d}" for number in range(units)]
    made = [
        one_piece(name, "/in/a.parquet", "a.parquet", number * ROWS, ROWS, expected_work=float(work))
        for number, (name, work) in enumerate(zip(names, expected, strict=True))
    ]
    return made, dict(zip(names, seconds.tolist(), strict=True))


def run_simulated(units: int, replicas: int, *, longest_first: bool, seed: int = 0) -> Dispatched:
    """Run a job through pipeline.driver.dispatcher. If not `longest_first`, the units' expected work is unknown."""
    work, seconds = make_work(units, replicas, seed=seed)
    if not longest_first:
        work = [replace(unit, expected_work=0.0) for unit in work]
    pool = VirtualPool(replicas, seconds)

    def clock() -> float:
        return pool.now

    telemetry, display = Telemetry(ROWS * units, clock=clock), LineDisplay(io.StringIO(), 5.0, clock)

    def hear(event: Event | None) -> None:
        telemetry.take(event)
        show_run(display, telemetry, event)

    results = dispatch(work, {}, pool, RetryPolicy(3, 0.1), threading.Event(), hear, StallWatch(telemetry, 1800.0))
    assert len(results) == units
    p50, p99 = np.percentile(pool.handovers, [50, 99]).tolist()
    return Dispatched(
        driver_ms_a_unit=1e3 * pool.driver_s / units,
        driver_share=pool.driver_s / pool.now,
        handover_ms_p50=1e3 * p50,
        handover_ms_p99=1e3 * p99,
        handover_ms_max=1e3 * max(pool.handovers),
        tail_ratio=pool.now / (sum(seconds.values()) / replicas),
        units_per_s=units / pool.now,
        rss_mb=_peak_mb(),
    )


def _peak_mb() -> float:
    # getrusage would report the peak of the parent process if that was larger
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024 / 1e6
