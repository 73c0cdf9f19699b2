"""Computes the throughput of a job over time from the times at which its units began and ended.

A unit's tokens are spread evenly over its seconds. Long times without any unit in progress (the job was stopped or
waited in a queue) are cut out of the time axis, so that a job that was resumed after a week looks like one that ran
without a break.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.report.facts import Unit

BINS = 60
"""Number of equal bins that the time axis is divided into."""
GAP_S, GAP_SHARE = 60.0, 0.05
"""A time without any unit in progress is cut out if it is longer than GAP_S seconds and longer than GAP_SHARE of the
seconds in which at least one unit was in progress."""
Array = npt.NDArray[np.float64]
"""Mostly one number for each bin of the time axis."""


@dataclass(frozen=True, slots=True)
class Place:
    """The work of one replica and of the replicas that replaced it after it was lost: they count as one in a report."""

    name: str
    """Name of the first of these replicas, such as `r3`."""
    units: int
    """Number of units that were published here. `rows` and `tokens` are those of these units."""
    rows: int
    tokens: int
    """Number of completion tokens."""
    processes: int
    """Number of different replicas that published a unit here."""
    work_s: float
    """Seconds during which at least one unit was in progress here."""
    rates: Array
    """Completion tokens/s in each bin of the timeline, shape (bins,)."""

    @property
    def tokens_per_s(self) -> float:
        """Return the completion tokens divided by `work_s`; 0 if `work_s` is 0."""
        return self.tokens / self.work_s if self.work_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """The time in which a job was at work, divided into equal bins, and the work in each bin."""

    seconds: float
    """Length of the time axis in seconds, without the idle times that were cut out; 0 if no unit has a time."""
    gaps: tuple[tuple[float, float], ...]
    """(position on the time axis, length) of each idle time that was cut out, both in seconds."""
    places: tuple[Place, ...]
    """The places; the place with the most tokens is first."""
    undated: int
    """Number of units whose parts say no time, as in earlier versions. They count in no bin and in no place."""
    working: Array
    """Number of places that generated tokens in each bin, shape (bins,)."""

    @property
    def rates(self) -> Array:
        """Return the completion tokens/s of all places together in each bin, shape (bins,)."""
        total: Array = np.sum([place.rates for place in self.places], axis=0) if self.places else np.zeros(BINS)
        return total


def timeline_of(units: Sequence[Unit]) -> Timeline:
    """Return the timeline of the published units of a job."""
    dated = [(unit.ended - max(unit.seconds, 1e-3), unit.ended, unit) for unit in units if unit.ended is not None]
    if not dated:
        return Timeline(0.0, (), (), len(units), np.zeros(BINS))
    sessions = _sessions(_union(dated))
    starts = np.array([start for start, _ in sessions])
    lengths = np.array([end - start for start, end in sessions])
    offsets = np.concatenate([[0.0], np.cumsum(lengths)])
    edges = np.linspace(0.0, float(offsets[-1]), BINS + 1)

    def on_axis(times: Array) -> Array:
        index = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, None)
        found: Array = offsets[index] + np.clip(times - starts[index], 0.0, lengths[index])
        return found

    by_place: dict[str, list[tuple[float, float, Unit]]] = {}
    for start, end, unit in dated:
        by_place.setdefault(unit.place, []).append((start, end, unit))
    places, working = [], np.zeros(BINS)
    for name, done in by_place.items():
        place = _place(name, done, on_axis(np.array([span[:2] for span in done])), edges)
        places.append(place)
        working += place.rates > 0
    gaps = tuple(
        (float(offset), later[0] - earlier[1])
        for offset, earlier, later in zip(offsets[1:-1], sessions, sessions[1:], strict=False)
    )
    places.sort(key=lambda place: (-place.tokens, place.name))
    return Timeline(float(offsets[-1]), gaps, tuple(places), len(units) - len(dated), working)


def _place(name: str, done: Sequence[tuple[float, float, Unit]], spans: Array, edges: Array) -> Place:
    """Return the place with this name.

    `done`: (start, end, unit) of each of its units, in seconds since 1970. `spans`: start and end of the same units on
    the time axis, shape (units, 2). `edges`: edges of the bins on that axis, shape (bins + 1,).
    """
    tokens = np.array([unit.totals.completion_tokens for *_, unit in done], np.float64)
    began, lengths = spans[:, 0], np.maximum(spans[:, 1] - spans[:, 0], 1e-9)
    made = [float(tokens @ np.clip((edge - began) / lengths, 0.0, 1.0)) for edge in edges]
    width = max(float(edges[1] - edges[0]), 1e-9)
    return Place(
        name,
        units=len(done),
        rows=sum(unit.totals.rows for *_, unit in done),
        tokens=int(tokens.sum()),
        processes=len({unit.replica for *_, unit in done}),
        work_s=sum(end - start for start, end in _union(done)),
        rates=np.diff(np.array(made)) / width,
    )


def _union(spans: Sequence[tuple[float, float, Unit]]) -> list[tuple[float, float]]:
    """Return the periods (start, end) covered by at least one span, in order and without overlap."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(span[:2] for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _sessions(busy: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the busy periods (start, end), those joined that only a short idle time separates (see GAP_S)."""
    longest = max(GAP_S, GAP_SHARE * sum(end - start for start, end in busy))
    sessions = [busy[0]]
    for start, end in busy[1:]:
        if start - sessions[-1][1] <= longest:
            sessions[-1] = sessions[-1][0], end
        else:
            sessions.append((start, end))
    return sessions
