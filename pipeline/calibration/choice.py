"""Chooses the point that a job should run at, and computes what the job costs at a point. All functions are pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.calibration.bench import Speed
from pipeline.calibration.points import AR, Point
from pipeline.calibration.quality import Quality

MIN_AGREEMENT = 0.95
"""Default for the minimum mean agreement with AR that a point needs. The published operating point keeps 98.7% of AR's
quality. A text that differs from AR's is seldom worse, so the share of different tokens may be a few times as large as
the loss of quality."""
MORE_REPETITION = 0.02
"""Maximum by which the mean repetition may exceed AR's: about one text in fifty that is a loop."""
LEAST_NOISE, MOST_NOISE = 0.02, 0.10
"""Speeds that differ by at most LEAST_NOISE (as a share) always count as equal, and speeds that differ by more than
MOST_NOISE never do. Between these limits the measured noise of the two speeds decides."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of the whole job and the resources it runs on."""

    rows: int
    """Rows of the whole job that can be generated, estimated from the sample."""
    replicas: int | None
    """Number of replicas; None means as many as fit."""
    gpus: int
    """GPUs of one replica; 0 means that it computes on the CPU."""
    price: float | None
    """Price of an hour of one GPU, or of one replica on CPUs; None if it is unknown."""
    currency: str
    extra_tokens: int = 0
    """Tokens by which max_new_tokens was lowered for the calibration."""


@dataclass(frozen=True, slots=True)
class Result:
    """A point that was measured, with its speed and quality."""

    point: Point
    speed: Speed
    quality: Quality
    measured_at: str
    """Time of the measurement, ISO 8601 in UTC."""

    @property
    def seconds_per_row(self) -> float:
        """Return the seconds that one replica takes for a row on average, or infinity if its speed is 0."""
        rate = self.speed.tokens_per_s
        return self.quality.tokens_per_row / rate if rate > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of the whole job at a point."""

    replica_hours: float
    hours: float
    """Wall-clock hours with the job's replicas, or with one replica if their number is open."""
    gpu_hours: float | None
    """GPU-hours of all replicas together; None on CPUs."""
    money: float | None
    most: float
    """Factor by which all of these can be higher at most, because rows were cut at a lowered max_new_tokens; 1 if it
    was not lowered."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The point to run at, and the results it was chosen from."""

    best: Result
    reference: Result
    """AR at the row limit at which it is fastest."""
    fastest: Result
    """The fastest result that qualifies. `best` is about as fast."""
    results: tuple[Result, ...]
    good: tuple[Result, ...]
    """The results that qualify."""
    min_agreement: float

    @property
    def speedup(self) -> float:
        """Return how many times as fast as AR the best point is, in rows per second."""
        return self.reference.seconds_per_row / self.best.seconds_per_row


def cost_of(result: Result, workload: Workload) -> Cost:
    """Return the cost of the whole job at this point, if every row has the mean number of tokens of the sample."""
    replica_hours = workload.rows * result.seconds_per_row / 3600
    gpu_hours = replica_hours * workload.gpus if workload.gpus else None
    priced = replica_hours if gpu_hours is None else gpu_hours
    money = None if workload.price is None else priced * workload.price
    tokens = result.quality.tokens_per_row
    most = 1 + result.quality.cut * workload.extra_tokens / tokens if tokens else 1.0
    return Cost(replica_hours, replica_hours / (workload.replicas or 1), gpu_hours, money, most)


def choose(results: Sequence[Result], min_agreement: float) -> Choice:
    """Choose the fastest point that agrees with AR and does not repeat itself much more than AR does.

    If several points are about as fast, the most careful one is chosen (see Point.care). `results` must hold AR at one
    row limit at least.
    """
    reference = min((r for r in results if r.point.setting == AR), key=lambda r: r.seconds_per_row)
    good = [result for result in results if _qualifies(result, reference, min_agreement)]
    fastest = min(good, key=lambda r: r.seconds_per_row)
    best = max((r for r in good if about_as_fast(r, fastest)), key=lambda r: r.point.care)
    return Choice(best, reference, fastest, tuple(results), tuple(good), min_agreement)


def about_as_fast(one: Result, other: Result) -> bool:
    """Return True if the two speeds differ by no more than the noise of the measurements."""
    noise = 2 * math.hypot(one.speed.error, other.speed.error)
    gap = abs(one.seconds_per_row - other.seconds_per_row) / max(one.seconds_per_row, other.seconds_per_row)
    return gap <= min(max(noise, LEAST_NOISE), MOST_NOISE) if math.isfinite(gap) else False


def _qualifies(result: Result, reference: Result, min_agreement: float) -> bool:
    if result.point.setting == AR:
        return True
    quality = result.quality
    no_loops = quality.repetition <= reference.quality.repetition + MORE_REPETITION
    return quality.agreement.mean >= min_agreement and no_loops and result.speed.tokens_per_s > 0
