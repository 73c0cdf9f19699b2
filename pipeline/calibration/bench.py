"""Defines the interface between a calibration and the replica that it measures: a protocol and its data types."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model.requests import Completion
from pipeline.calibration.points import Point
from pipeline.calibration.sample import SampleRow

RowLimit = int | Literal["auto"]
"""Maximum number of rows to generate together; `auto` means as many as the replica's memory holds."""
Tick = Callable[[int, int], None]
"""A callback for progress: it is called repeatedly with (rows done, rows expected). An exception that it raises ends
the measurement."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that was started, and the row limits that it can hold."""

    device: str
    """`2 x NVIDIA H100`, or the kind of processor with the number of threads in use."""
    row_limits: tuple[tuple[RowLimit, int], ...]
    """The row limits that fit: each as it was asked for, and the number of rows that it means."""
    refused: tuple[tuple[RowLimit, str], ...]
    """The row limits that do not fit, each with the reason."""
    versions: tuple[tuple[str, str], ...]
    """Versions of the software that computes, as pairs of name and version."""


@dataclass(frozen=True, slots=True)
class Task:
    """A point to measure, and how long to measure it."""

    point: Point
    whole: bool
    """Whether every row of the sample must run to its end. If not, only as many rows run as the speed needs."""
    window_s: float
    """Minimum time to measure at full speed, in seconds."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a replica while all its slots are taken.

    The rows of the sample are submitted again and again, so that no slot stays empty. The window of the measurement
    opens when as many rows have ended as there are slots: from then on rows are at different positions, as in a long
    job. Its tokens are those of the rows that ended in it, plus the tokens so far of the rows running at its end, minus
    the tokens so far of the rows running at its beginning.
    """

    tokens_per_s: float
    error: float
    """Standard error of tokens_per_s as a share of it, computed from equal pieces of the window."""
    window_s: float
    window_tokens: int
    window_rows: int
    """Rows that ended in the window."""
    seconds: float
    """Seconds that the point took in all."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a task."""

    speed: Speed | None
    """The speed; None if memory ran out, so that fewer rows ran together than the point asks for."""
    rows: tuple[Completion, ...] = ()
    """The completions of all rows of the sample, in its order, as the job would make them; empty if the task is not
    whole."""
    greedy: tuple[Completion, ...] = ()
    """The same completions at temperature 0. Empty if the task is not whole, or if the job does not sample: then `rows`
    are made at temperature 0 already."""


class Bench(Protocol):
    """A replica that measures points. Its methods raise TwoTowerError if it cannot continue, and pass on what a tick
    raises."""

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """Load the model and find out which row limits fit. Call this once, before `measure`."""

    def measure(self, task: Task, tick: Tick) -> Run: ...

    def close(self) -> None:
        """Release all resources. This may be called after an error, and more than once."""
