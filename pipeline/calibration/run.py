"""Measures the points of a calibration one after another until the time limit, and saves the result of each at once."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.calibration.bench import Bench, Replica, RowLimit, Run, Speed, Task
from pipeline.calibration.choice import Choice, Result, choose
from pipeline.calibration.points import AR, Point, Setting, order_points
from pipeline.calibration.quality import Answers, Quality, judge, to_answer
from pipeline.calibration.results import record
from pipeline.calibration.setup import Setup
from pipeline.config.job import Job
from pipeline.core.errors import JobError, JobFailed, TwoTowerError
from pipeline.core.text import duration
from pipeline.monitoring.progress import Display, Progress
from pipeline.output.records import now
from pipeline.storage.urls import safe_url

WINDOW_S = 3.0
"""Minimum time to measure each point at full speed, in seconds."""
TIME_IS_UP = "the time limit (--minutes)"
"""Reason why a point was not measured: the time was up, or would have been before the end of the point."""
NO_QUALITY = "its setting was not measured at the largest row limit"
NO_MEMORY = "memory ran out with so many rows"
"""Other reasons why a point was not measured: the quality of its setting is unknown, or its rows do not fit in
memory."""


class Stopped(Exception):  # noqa: N818 (not an error: the user asked for it)
    """Raised by the ticks of a calibration to end a measurement that the user has stopped."""


class _TimeIsUp(Exception):  # noqa: N818
    """Raised by the ticks of a calibration to end a measurement at the time limit."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a calibration: the measurements of this run and of earlier runs, and the choice made from them."""

    setup: Setup
    replica: Replica
    """The replica that all points were measured on, as started now or as recorded by an earlier run."""
    choice: Choice
    """The choice among all points in the folder, also those that this run did not ask for."""
    own: Point
    """The point that the job is set to. Its setting is AR if the job's mode is not diffusion; its row limit is the
    largest that fits if the job's own does not fit."""
    answers: Mapping[Setting, Answers]
    """The answers of each setting whose quality was measured."""
    missing: tuple[tuple[Point, str], ...]
    """The points that this run asked for and that are still not measured, each with the reason."""
    kept: int
    """Number of points of this run that an earlier run had measured."""
    stopped: bool
    """Whether the user stopped the measuring."""
    failure: str | None = None
    """Text of the error that ended the measuring early; None if there was none."""


def measure(
    setup: Setup,
    make_bench: Callable[[Job], Bench],
    display: Display,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure the points that are not measured yet, save each one at once, and choose among all of them.

    No replica is made if all points are measured already. Setting `stop` ends the measuring at the next tick; so does
    the time limit of the options. Raises what starting a replica raises, OutputError if the folder holds the
    measurements of another replica, JobError if no row limit fits, and JobFailed if not even AR could be measured. If
    the replica fails later, the error is the `failure` of the outcome.
    """
    return _Measuring(setup, display, stop, clock).run(make_bench)


class _Measuring:
    """The state of a call of `measure`: what is measured already, what cannot be, and when the time is up."""

    def __init__(self, setup: Setup, display: Display, stop: threading.Event, clock: Callable[[], float]) -> None:
        self._setup, self._display, self._stop, self._clock = setup, display, stop, clock
        self._speeds: dict[Point, tuple[Speed, str]] = {}
        self._answers: dict[Setting, Answers] = {}
        self._qualities: dict[Setting, Quality] = {}
        self._missing: dict[Point, str] = {}
        self._limits: dict[RowLimit, int] = {}  # limit as asked for -> rows; without those at which memory ran out
        self._own = Point(AR, 0)
        self._deadline = float("inf")
        self._work = ""  # the piece of work in progress, as it is shown
        self._shared: Mapping[str, Any] = {}  # the columns of the measurements that are the same in all rows

    def run(self, make_bench: Callable[[Job], Bench]) -> Outcome:
        """See `measure`."""
        limits = tuple(dict.fromkeys([*self._setup.options.rows, self._setup.job.engine.max_rows]))
        replica = self._setup.folder.read_replica()
        if replica is not None and {*limits} <= {limit for limit, _ in (*replica.row_limits, *replica.refused)}:
            points = self._begin(replica)
            if self._speeds.keys() >= {*points}:
                return self._outcome(replica, points, len(points), None)
        bench = make_bench(self._setup.measured)
        try:
            return self._run_on(bench, limits)
        finally:
            bench.close()

    def _run_on(self, bench: Bench, limits: tuple[RowLimit, ...]) -> Outcome:
        setup = self._setup
        self._show_work(f"loading {safe_url(setup.job.model.checkpoint)}")
        try:
            replica = bench.start(setup.sample.rows, limits, self._check_stop)
        except Stopped:
            raise JobFailed("stopped before anything was measured") from None
        for limit, why in replica.refused:
            self._display.tell(f"row limit {record.limit_name(limit)} is left out: {why}")
        if not replica.row_limits:
            raise JobError(f"none of the row limits fits: {replica.refused[0][1]}")
        setup.folder.take({**setup.identity, **record.of_replica(replica)}, replica)
        points = self._begin(replica)
        kept = len(self._speeds.keys() & {*points})
        self._deadline = self._clock() + 60 * setup.options.minutes
        return self._outcome(replica, points, kept, self._measure_all(bench, points))

    def _begin(self, replica: Replica) -> tuple[Point, ...]:
        """Take the replica's row limits, read the earlier measurements, and return the points of this run in order."""
        self._limits = dict(replica.row_limits)
        self._shared = record.shared_columns(self._setup.measured, replica)
        self._own = self._own_point()
        points = self._points()
        self._read(points)
        return points

    def _points(self) -> tuple[Point, ...]:
        options = self._setup.options
        rows = [rows for limit, rows in self._limits.items() if limit in options.rows]
        return order_points(options.thresholds, options.steps, rows, self._own_point()) if self._limits else ()

    def _own_point(self) -> Point:
        """Return the point that the job is set to (see Outcome.own)."""
        job = self._setup.job
        rows = self._limits.get(job.engine.max_rows, max(self._limits.values()))
        if job.generation.mode != "diffusion":
            return Point(AR, rows)
        return Point(Setting("diffusion", job.generation.confidence_threshold, job.generation.steps_per_block), rows)

    def _read(self, points: tuple[Point, ...]) -> None:
        """Read the measurements of earlier runs. Points that this run does not ask for are read too, because the file
        of measurements is written anew and must not lose them."""
        setup = self._setup
        speeds = setup.folder.read_points()
        for setting in dict.fromkeys(point.setting for point in [*speeds, *points]):
            if (answers := setup.folder.read_answers(setting, setup.sample.rows)) is not None:
                self._answers[setting] = answers
        self._speeds = {point: speed for point, speed in speeds.items() if point.setting in self._answers}
        if AR not in self._answers:  # without AR nothing can be compared: measure all points again
            self._speeds, self._answers = {}, {}

    def _measure_all(self, bench: Bench, points: tuple[Point, ...]) -> Exception | None:
        """Measure the points that are left. Return the exception that ended this early (Stopped, or an error of the
        replica), or None if there was none. Points that the time limit or memory leaves out are noted as missing."""
        while left := [p for p in self._points() if p not in self._speeds and p not in self._missing]:
            point = left[0]
            whole = point.setting not in self._answers
            if why := self._obstacle(point, whole):
                self._missing[point] = why
                continue
            self._show_work(f"{len(points) - len(left) + 1} of {len(points)}: {point.label}", self._time_left(left))
            try:
                run = bench.measure(Task(point, whole, WINDOW_S), self._tick)
            except _TimeIsUp:
                self._missing[point] = TIME_IS_UP
                continue
            except (Stopped, TwoTowerError) as error:
                self._missing[point] = "stopped while it was measured" if isinstance(error, Stopped) else str(error)
                return error
            if run.speed is not None:
                self._keep(point, run, run.speed)
            else:
                self._display.tell(f"row limit {point.max_rows} is left out: memory ran out")
                self._missing |= {p: NO_MEMORY for p in left if p.max_rows == point.max_rows}
                self._limits = {limit: rows for limit, rows in self._limits.items() if rows != point.max_rows}
        return None

    def _obstacle(self, point: Point, whole: bool) -> str | None:
        """Return the reason why the point cannot be measured now, or None if it can."""
        if whole and point.max_rows != max(self._limits.values()):
            return NO_QUALITY
        left = self._deadline - self._clock()
        return TIME_IS_UP if left <= 0 or self._estimate(point) > left else None

    def _estimate(self, point: Point) -> float:
        """Return the seconds that the point will probably take: those of the slowest measured point with the same row
        limit, else of the slowest measured point of all, else 0."""
        alike = [speed.seconds for known, (speed, _) in self._speeds.items() if known.max_rows == point.max_rows]
        return max(alike or [speed.seconds for speed, _ in self._speeds.values()], default=0.0)

    def _time_left(self, points: Sequence[Point]) -> float | None:
        if not self._speeds:
            return None
        wanted = sum(self._estimate(point) for point in points)
        return max(0.0, min(wanted, self._deadline - self._clock()))

    def _keep(self, point: Point, run: Run, speed: Speed) -> None:
        setup = self._setup
        if run.rows:
            rows = tuple(to_answer(done, setup.eos_ids) for done in run.rows)
            greedy = tuple(to_answer(done, setup.eos_ids) for done in run.greedy) or rows
            answers = Answers(rows, greedy)
            if point.setting == AR and all(answer.error for answer in answers.greedy):
                raise JobFailed(f"every row fails in AR mode: {answers.greedy[0].error}")
            setup.folder.write_answers(point.setting, setup.sample.rows, answers)
            self._answers[point.setting] = answers
        self._speeds[point] = speed, now()
        self._write()

    def _write(self) -> Choice:
        setup = self._setup
        results = self._results()
        choice = choose(results, setup.options.min_agreement)
        setup.folder.write_measurements(record.measurements(choice, setup.workload, self._shared))
        return choice

    def _results(self) -> list[Result]:
        reference, weights = self._answers[AR], self._setup.sample.weights
        for setting in dict.fromkeys(point.setting for point in self._speeds):
            if setting not in self._qualities:
                self._qualities[setting] = judge(self._answers[setting], reference, weights)
        return [Result(point, speed, self._qualities[point.setting], at) for point, (speed, at) in self._speeds.items()]

    def _outcome(self, replica: Replica, points: tuple[Point, ...], kept: int, ended_by: Exception | None) -> Outcome:
        if not self._speeds:
            raise JobFailed(self._nothing_measured(self._missing[points[0]], ended_by))
        for point in points:
            if point not in self._speeds:
                self._missing.setdefault(point, "not begun before the end of the calibration")
        failure = str(ended_by) if isinstance(ended_by, TwoTowerError) else None
        missing = tuple(self._missing.items())
        stopped = isinstance(ended_by, Stopped)
        return Outcome(self._setup, replica, self._write(), self._own, self._answers, missing, kept, stopped, failure)

    def _nothing_measured(self, why: str, ended_by: Exception | None) -> str:
        if isinstance(ended_by, Stopped):
            return "stopped before the first point was measured"
        if why == TIME_IS_UP:
            return (
                f"AR alone over {len(self._setup.sample.rows)} rows takes longer than --minutes "
                f"{self._setup.options.minutes:g}: raise it, or lower --sample or --max-new-tokens"
            )
        return f"AR could not be measured: {why}"

    def _show_work(self, what: str, left_s: float | None = None) -> None:
        """Show the piece of work that begins now. `left_s`: estimated seconds for all work left; None if unknown."""
        self._work = what if left_s is None else f"{what} · about {duration(left_s)} left"
        self._display.show(Progress(self._work))

    def _check_stop(self, _done: int, _expected: int) -> None:
        if self._stop.is_set():
            raise Stopped

    def _tick(self, done: int, expected: int) -> None:
        self._check_stop(done, expected)
        if self._clock() > self._deadline:
            raise _TimeIsUp
        if self._display.due():
            text = f"{self._work} · {done:,}/{expected:,} rows"
            self._display.show(Progress(text, done, max(1, expected)))
