"""What a calibration asks of a replica, and what it gets back: carriers and the seam between the two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model.requests import Completion
from pipeline.calibration.points import Point
from pipeline.calibration.sample import SampleRow

RowLimit = int | Literal["auto"]
"""Rows generated together; auto: as many as the replica's memory holds."""
Tick = Callable[[int, int], None]
"""Called again and again with (rows done, rows expected) of a point. What it raises ends the measuring."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What was started."""

    device: str
    """`2 x NVIDIA H100`, or the processor's name with the threads in use."""
    row_limits: tuple[tuple[RowLimit, int], ...]
    """For each that was asked for and fits: as asked, and how many rows that is."""
    refused: tuple[tuple[RowLimit, str], ...]
    """Those that do not fit, and why."""
    versions: tuple[tuple[str, str], ...]
    """Of what computes, by name."""


@dataclass(frozen=True, slots=True)
class Task:
    """A point to measure."""

    point: Point
    whole: bool
    """Run every row of the sample to its end; else only as many as the speed needs."""
    window_s: float
    """Seconds of full speed to watch at least."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a replica is while all its slots are taken.

    The sample is given again and again, so that no slot stays empty. The window opens when as many rows have ended as
    there are slots: then rows are at different places, as in a long job. It counts the tokens of rows that ended in it,
    with those of the rows under way at its end, less those of the rows under way at its beginning.
    """

    tokens_per_s: float
    error: float
    """Standard error of tokens_per_s as a share of it, from equal pieces of the window."""
    window_s: float
    window_tokens: int
    window_rows: int
    """Rows that ended in it."""
    seconds: float
    """That the point took in all."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a task."""

    speed: Speed | None
    """None where memory ran out, so that fewer rows ran together than the point says."""
    rows: tuple[Completion, ...] = ()
    """Of a whole task: a completion for each row of the sample, in its order, as the job would make it."""
    greedy: tuple[Completion, ...] = ()
    """The same at temperature 0, where the job samples; else `rows` are that already."""


class Bench(Protocol):
    """One replica. Raises TwoTowerError where it cannot go on, and what a tick raises."""

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """Loads the model. Called once, first."""

    def measure(self, task: Task, tick: Tick) -> Run: ...

    def close(self) -> None:
        """Lets go of it all; also after an error, and twice."""
