"""Distributions: bins of a histogram, and the few numbers that stand for them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.report.rows import Counts, Floats

BINS = 32
TAIL, NEAR = 0.995, 0.1
"""What lies above this share of the values goes into the last bin, so that one outlier does not flatten the rest; but
not where it is near: the second is a share of the range."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges."""

    edges: npt.NDArray[np.float64]
    """(bins + 1,)"""
    counts: Counts
    """(bins,)"""
    median: float
    cut: bool
    """Whether the last bin holds all that is above it."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution in numbers."""

    mean: float
    quantiles: tuple[float, ...]
    """Those of QUANTILES."""
    most: float


def histogram(values: Floats) -> Histogram | None:
    """A bin a whole number where all values are whole and near each other, else BINS of them; None: no values."""
    if not len(values):
        return None
    low, most = float(values.min()), float(values.max())
    high = float(np.quantile(values, TAIL))
    if most - high <= NEAR * (high - low):
        high = most
    if np.array_equal(values, np.round(values)):
        step = max(1, int(np.ceil((high - low + 1) / BINS)))
        edges = np.arange(low - 0.5, high + 0.5 + step, step)
    else:
        if high <= low:  # nearly all are the same
            high = most if most > low else low + (abs(low) or 1.0)
        edges = np.linspace(low, high, BINS + 1)
    counts = np.histogram(np.minimum(values, edges[-1]), bins=edges)[0]
    return Histogram(edges, counts.astype(np.int64), float(np.median(values)), most > edges[-1])


def histogram_of_counts(counts: Counts) -> Histogram | None:
    """The same of whole numbers from 0 up that were counted: (values,) -> a bin each, from the first to the last."""
    present = np.flatnonzero(counts)
    if not len(present):
        return None
    low, high = int(present[0]), int(present[-1])
    median = float(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return Histogram(np.arange(low - 0.5, high + 1.5), counts[low : high + 1], median, high == len(counts) - 1)


def summary(values: Floats) -> Summary | None:
    """None: no values."""
    if not len(values):
        return None
    quantiles = tuple(float(value) for value in np.quantile(values, QUANTILES))
    return Summary(float(values.mean(dtype=np.float64)), quantiles, float(values.max()))


def summary_of_counts(counts: Counts) -> Summary | None:
    """The same of whole numbers from 0 up that were counted."""
    total = int(counts.sum())
    if not total:
        return None
    below = np.cumsum(counts)
    quantiles = tuple(float(np.searchsorted(below, share * total)) for share in QUANTILES)
    mean = float(np.arange(len(counts)) @ counts / total)
    return Summary(mean, quantiles, float(np.flatnonzero(counts)[-1]))
