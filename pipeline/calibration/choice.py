"""Which of the points a job should run at, what that costs, and how sure it is: pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.calibration.bench import Speed
from pipeline.calibration.points import AR, Point
from pipeline.calibration.quality import Quality

MIN_AGREEMENT = 0.95
"""The published operating point keeps 98.7% of AR's quality. A text that differs from AR's is seldom worse for it, so
tokens may differ a few times as often as quality may fall."""
MORE_REPETITION = 0.02
"""By so much the mean repetition may be above AR's: a text of fifty that loops."""
LEAST_NOISE, MOST_NOISE = 0.02, 0.10
"""Speeds that differ by less than the first, as a share, are the same, by more than the second never; between them what
the measurements say of their own noise decides."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The whole job."""

    rows: int
    """That can be generated, as far as the sample tells."""
    replicas: int | None
    """None: as many as fit."""
    gpus: int
    """Of a replica; 0: it computes on the CPU."""
    price: float | None
    """Of an hour of a GPU, or of a replica on CPUs; None: unknown."""
    currency: str
    extra_tokens: int = 0
    """By which max_new_tokens was lowered for the calibration."""


@dataclass(frozen=True, slots=True)
class Result:
    """A point that was measured."""

    point: Point
    speed: Speed
    quality: Quality
    measured_at: str
    """ISO 8601 in UTC."""

    @property
    def seconds_per_row(self) -> float:
        """Of a replica."""
        rate = self.speed.tokens_per_s
        return self.quality.tokens_per_row / rate if rate > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the whole job at a point."""

    replica_hours: float
    hours: float
    """Wall clock with the job's replicas, or with one where their number is open."""
    gpu_hours: float | None
    """None on CPUs."""
    money: float | None
    most: float
    """Factor by which all of these can be higher at most, where rows were cut at a lowered max_new_tokens; else 1."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The point to run at, and what it was chosen from."""

    best: Result
    reference: Result
    """AR at its fastest."""
    fastest: Result
    """Of those that qualify; `best` is about as fast."""
    results: tuple[Result, ...]
    good: tuple[Result, ...]
    """Those that qualify."""
    min_agreement: float

    @property
    def speedup(self) -> float:
        """Of the best against AR: rows a second over rows a second."""
        return self.reference.seconds_per_row / self.best.seconds_per_row


def cost_of(result: Result, workload: Workload) -> Cost:
    """What the whole job takes at this point: every row as many tokens as the mean of the sample."""
    replica_hours = workload.rows * result.seconds_per_row / 3600
    gpu_hours = replica_hours * workload.gpus if workload.gpus else None
    priced = replica_hours if gpu_hours is None else gpu_hours
    money = None if workload.price is None else priced * workload.price
    tokens = result.quality.tokens_per_row
    most = 1 + result.quality.cut * workload.extra_tokens / tokens if tokens else 1.0
    return Cost(replica_hours, replica_hours / (workload.replicas or 1), gpu_hours, money, most)


def choose(results: Sequence[Result], min_agreement: float) -> Choice:
    """The fastest point that agrees with AR and repeats itself no more; among those about as fast the most careful.

    `results` hold AR at one row limit at least.
    """
    reference = min((r for r in results if r.point.setting == AR), key=lambda r: r.seconds_per_row)
    good = [result for result in results if _qualifies(result, reference, min_agreement)]
    fastest = min(good, key=lambda r: r.seconds_per_row)
    best = max((r for r in good if about_as_fast(r, fastest)), key=lambda r: r.point.care)
    return Choice(best, reference, fastest, tuple(results), tuple(good), min_agreement)


def about_as_fast(one: Result, other: Result) -> bool:
    """Whether the difference of their speeds is within the noise."""
    noise = 2 * math.hypot(one.speed.error, other.speed.error)
    gap = abs(one.seconds_per_row - other.seconds_per_row) / max(one.seconds_per_row, other.seconds_per_row)
    return gap <= min(max(noise, LEAST_NOISE), MOST_NOISE) if math.isfinite(gap) else False


def _qualifies(result: Result, reference: Result, min_agreement: float) -> bool:
    if result.point.setting == AR:
        return True
    quality = result.quality
    no_loops = quality.repetition <= reference.quality.repetition + MORE_REPETITION
    return quality.agreement.mean >= min_agreement and no_loops and result.speed.tokens_per_s > 0
