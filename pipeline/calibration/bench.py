"""Defines the interface between a calibration and the replica that it measures: the protocol Bench and its data
types."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model.requests import Completion
from pipeline.calibration.points import Point
from pipeline.calibration.sample import SampleRow

RowLimit = int | Literal["auto"]
"""The largest number of rows to generate together; `auto` means as many as fit in the memory of the replica."""
Tick = Callable[[int, int], None]
"""A callback for progress: it is called repeatedly with (rows done, rows expected), or (0, 0) while the replica gives
no counts. An exception that it raises ends the call of the Bench that it was given to; a replica in a process of its
own may compute on."""


@dataclass(frozen=True, slots=True)
class Replica:
    """The description of a replica that was started: its device, its software, and the row limits that fit in its
    memory."""

    device: str
    """The GPUs, such as `2 x NVIDIA H100`, or the kind of processor with the number of threads in use."""
    row_limits: tuple[tuple[RowLimit, int], ...]
    """The row limits that fit: each as it was asked for, with the number of rows that it means."""
    refused: tuple[tuple[RowLimit, str], ...]
    """The row limits that do not fit, each with the reason."""
    versions: tuple[tuple[str, str], ...]
    """(name, version) of twotower, torch and Python on the replica."""


@dataclass(frozen=True, slots=True)
class Task:
    """A point to measure, with how many rows and how long it is to be measured."""

    point: Point
    whole: bool
    """Whether every row of the sample must run to its end and be returned. If not, only as many rows run as measuring
    the speed needs."""
    window_s: float
    """Minimum time to measure at full speed, in seconds."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a replica while all slots of its engine are taken.

    The rows of the sample are submitted again and again, so that no slot stays empty. The window of the measurement
    opens when as many rows have ended as there are slots: from then on rows are at different positions, as in a long
    job. Its tokens are those of the rows that ended in it, plus the tokens so far of the rows running at its end, minus
    the tokens so far of the rows running at its beginning.
    """

    tokens_per_s: float
    error: float
    """Standard error of tokens_per_s as a share of it, computed from equal pieces of the window; 1 if there are no
    tokens."""
    window_s: float
    """Length of the window in seconds."""
    window_tokens: int
    """Completion tokens of the window."""
    window_rows: int
    """Rows that ended in the window."""
    seconds: float
    """Seconds from the first row submitted to the last row ended. The run at temperature 0 (Run.greedy) and the making
    of an engine are not included."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a task: the speed at its point and, if the task is whole, the completions."""

    speed: Speed | None
    """The speed; None if memory ran out, so that fewer rows ran together than the point asks for."""
    rows: tuple[Completion, ...] = ()
    """The completions of all rows of the sample, in its order, as the job would make them; empty if the task is not
    whole."""
    greedy: tuple[Completion, ...] = ()
    """Completions of the same rows at temperature 0. Empty if the task is not whole, or if the job does not sample:
    `rows` are made at temperature 0 then."""


class Bench(Protocol):
    """A loaded replica that measures points. Its methods raise TwoTowerError if the replica cannot continue, and
    whatever a tick raises."""

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """Load the model, check it, and find out which row limits fit. Call this once, before `measure`.

        `rows`: the sample, which all points are measured with.
        """

    def measure(self, task: Task, tick: Tick) -> Run:
        """Measure one point and return its speed, with completions if the task is whole; no speed if memory ran out."""

    def close(self) -> None:
        """Release the model and everything else. This may be called before `start`, after an error, and more than
        once."""
