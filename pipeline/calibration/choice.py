"""Chooses the point that a job should run at, from measurements, and computes what the job costs at a point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.calibration.bench import Speed
from pipeline.calibration.points import AR, Point
from pipeline.calibration.quality import Quality

MIN_AGREEMENT = 0.95
"""Default for the smallest mean agreement with AR at which a point may be chosen. The published operating point keeps
98.7% of AR's quality. A text that differs from AR's is seldom worse, so the share of different tokens may be a few
times as large as the loss of quality."""
MORE_REPETITION = 0.02
"""The most by which the mean repetition of a point may exceed AR's: as if one more text in fifty were all loop."""
LEAST_NOISE, MOST_NOISE = 0.02, 0.10
"""Two speeds that differ by at most LEAST_NOISE, as a share of the larger one, always count as equal. Speeds that
differ by more than MOST_NOISE never do. In between, the measured noise of the two speeds decides."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of the whole job, its replicas and their price: what its cost at a point is computed from."""

    rows: int
    """Number of rows of the whole job that can be generated: all rows times the share of usable rows among those read
    for the sample."""
    replicas: int | None
    """Number of replicas; None means as many as fit."""
    gpus: int
    """GPUs of one replica; 0 means that it computes on the CPU."""
    price: float | None
    """Price of an hour of one GPU, or of one replica on CPUs; None if it is unknown."""
    currency: str
    extra_tokens: int = 0
    """Number of tokens by which max_new_tokens was lowered for the calibration; 0 if it was not."""


@dataclass(frozen=True, slots=True)
class Result:
    """A point that was measured, with its speed and the quality of its setting."""

    point: Point
    speed: Speed
    quality: Quality
    measured_at: str
    """Time of the measurement, ISO 8601 in UTC."""

    @property
    def seconds_per_row(self) -> float:
        """Return the mean seconds per row of one replica with all slots taken; infinity if its speed is 0."""
        rate = self.speed.tokens_per_s
        return self.quality.tokens_per_row / rate if rate > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of the whole job at a point, without the loading of the model."""

    replica_hours: float
    """Hours of all replicas together."""
    hours: float
    """Wall-clock hours with as many replicas as the job has; with one replica if the job leaves their number open."""
    gpu_hours: float | None
    """GPU-hours of all replicas together; None on CPUs."""
    money: float | None
    """Price of these hours in Workload.currency; None if no price is known."""
    most: float
    """Factor by which all of these can be higher at most, because rows were cut at a lowered max_new_tokens; 1 if none
    were."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The point that a job should run at, and the results that it was chosen from (see `choose`)."""

    best: Result
    """The result whose point is chosen."""
    reference: Result
    """AR at the row limit at which it is fastest."""
    fastest: Result
    """The fastest result that qualifies. `best` is about as fast."""
    results: tuple[Result, ...]
    """All results, whether they qualify or not."""
    good: tuple[Result, ...]
    """The results that qualify: AR, and those that agree with AR well enough and hardly loop more than AR."""
    min_agreement: float

    @property
    def speedup(self) -> float:
        """Return how many times as fast as AR the best point is, in rows per second."""
        return self.reference.seconds_per_row / self.best.seconds_per_row


def cost_of(result: Result, workload: Workload) -> Cost:
    """Return the cost of the whole job at a point, if its rows have the mean number of tokens of the sample."""
    replica_hours = workload.rows * result.seconds_per_row / 3600
    gpu_hours = replica_hours * workload.gpus if workload.gpus else None
    priced = replica_hours if gpu_hours is None else gpu_hours
    money = None if workload.price is None else priced * workload.price
    tokens = result.quality.tokens_per_row
    most = 1 + result.quality.cut * workload.extra_tokens / tokens if tokens else 1.0
    return Cost(replica_hours, replica_hours / (workload.replicas or 1), gpu_hours, money, most)


def choose(results: Sequence[Result], min_agreement: float) -> Choice:
    """Choose the fastest point that qualifies; among points that are about as fast, the most careful one (Point.care).

    AR qualifies always. Any other point qualifies if its mean agreement with AR is at least `min_agreement`, its
    mean repetition is above AR's by at most MORE_REPETITION, and its speed is not 0. `results` must hold AR at one row
    limit at least.
    """
    reference = min((r for r in results if r.point.setting == AR), key=lambda r: r.seconds_per_row)
    good = [result for result in results if _qualifies(result, reference, min_agreement)]
    fastest = min(good, key=lambda r: r.seconds_per_row)
    best = max((r for r in good if about_as_fast(r, fastest)), key=lambda r: r.point.care)
    return Choice(best, reference, fastest, tuple(results), tuple(good), min_agreement)


def about_as_fast(one: Result, other: Result) -> bool:
    """Return True if the seconds per row differ only by the noise of the measurements; False if a speed is 0."""
    noise = 2 * math.hypot(one.speed.error, other.speed.error)
    gap = abs(one.seconds_per_row - other.seconds_per_row) / max(one.seconds_per_row, other.seconds_per_row)
    return gap <= min(max(noise, LEAST_NOISE), MOST_NOISE) if math.isfinite(gap) else False


def _qualifies(result: Result, reference: Result, min_agreement: float) -> bool:
    if result.point.setting == AR:
        return True
    quality = result.quality
    no_loops = quality.repetition <= reference.quality.repetition + MORE_REPETITION
    return quality.agreement.mean >= min_agreement and no_loops and result.speed.tokens_per_s > 0
