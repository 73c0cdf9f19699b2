"""Computes histograms and summary numbers (mean, quantiles, largest value) of the measures of rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.report.rows import Counts, Floats

BINS = 32
"""Number of bins of a histogram; a histogram of whole numbers may have fewer."""
TAIL, NEAR = 0.995, 0.1
"""Values above the TAIL quantile go into the last bin, so that one outlier does not flatten the rest. This is not done
if the largest value is above that quantile by at most NEAR times the distance from the smallest value to it."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""The quantiles in a Summary, each as the share of the values that are not larger."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram of a measure: how many of its values lie in each of several adjacent bins."""

    edges: npt.NDArray[np.float64]
    """Edges of the bins in ascending order, shape (bins + 1,)."""
    counts: Counts
    """Number of values in each bin, shape (bins,)."""
    median: float
    """Median of all values."""
    cut: bool
    """Whether the last bin also counts the values above its upper edge."""
    whole: bool
    """Whether all values are whole numbers. The edges are then halfway between them."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The mean, some quantiles and the largest of the values of a measure."""

    mean: float
    quantiles: tuple[float, ...]
    """The quantiles for the shares in QUANTILES, in the same order."""
    most: float
    """The largest value."""


def histogram(values: Floats) -> Histogram | None:
    """Return a histogram of finite values, or None if there are no values.

    If all values are whole numbers, each bin covers one whole number, or several if there would be more than BINS bins.
    Otherwise there are BINS bins of equal width. The last bin may also count larger values (see TAIL).
    """
    if not len(values):
        return None
    low, most = float(values.min()), float(values.max())
    high = float(np.quantile(values, TAIL))
    if most - high <= NEAR * (high - low):
        high = most
    whole = np.array_equal(values, np.round(values))
    if whole:
        step = max(1, int(np.ceil((high - low + 1) / BINS)))
        edges = np.arange(low - 0.5, high + 0.5 + step, step)
    else:
        if high <= low:  # nearly all values are the same
            high = most if most > low else low + (abs(low) or 1.0)
        edges = np.linspace(low, high, BINS + 1)
    counts = np.histogram(np.minimum(values, edges[-1]), bins=edges)[0]
    return Histogram(edges, counts.astype(np.int64), float(np.median(values)), most > edges[-1], whole)


def histogram_of_counts(counts: Counts) -> Histogram | None:
    """Return a histogram of whole numbers that were counted, or None if all counts are 0.

    `counts[n]`: how often n occurs, shape (values,). The last of the counts stands for its number and all larger ones,
    so the histogram is `cut` if that number occurs. There is one bin for each number from the smallest to the largest
    that occurs.
    """
    present = np.flatnonzero(counts)
    if not len(present):
        return None
    low, high = int(present[0]), int(present[-1])
    median = float(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    cut = high == len(counts) - 1
    return Histogram(np.arange(low - 0.5, high + 1.5), counts[low : high + 1], median, cut, whole=True)


def summary(values: Floats) -> Summary | None:
    """Return the summary of the values, or None if there are no values."""
    if not len(values):
        return None
    quantiles = tuple(float(value) for value in np.quantile(values, QUANTILES))
    return Summary(float(values.mean(dtype=np.float64)), quantiles, float(values.max()))


def summary_of_counts(counts: Counts) -> Summary | None:
    """Return the summary of whole numbers that were counted, or None if all counts are 0.

    `counts[n]`: how often n occurs, shape (values,).
    """
    total = int(counts.sum())
    if not total:
        return None
    below = np.cumsum(counts)
    quantiles = tuple(float(np.searchsorted(below, share * total)) for share in QUANTILES)
    mean = float(np.arange(len(counts)) @ counts / total)
    return Summary(mean, quantiles, float(np.flatnonzero(counts)[-1]))
