"""Defines the scripted forwards of the loop's tests: what each was given, and how it may fail. Does not import
torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from model.engine.backend import BlockReport
from model.engine.loop import Kind
from model.engine.sequence import ActiveRow, Prefix

Fault = Literal["launch", "collect", "launch oom", "collect oom", "launch interrupt", "collect interrupt"]


class ScriptedError(RuntimeError):
    """An error that is raised by script."""


class NoMemoryError(RuntimeError):
    """An error that is raised by script and stands for a lack of memory."""


class Launch(NamedTuple):
    """The work of a forward. A context forward takes pieces of prompts and then finished blocks, a denoiser forward
    only blocks."""

    kind: Kind
    pieces: list[tuple[ActiveRow | Prefix, int]]
    blocks: list[tuple[ActiveRow | Prefix, int]]

    @property
    def work(self) -> list[tuple[ActiveRow | Prefix, int]]:
        """Return all rows and prefixes, each with its number of tokens."""
        return self.pieces + self.blocks


@dataclass(slots=True, eq=False)
class Ticket:
    """A scripted forward that has been launched. It takes one second."""

    kind: Kind
    number: int
    collect: "Callable[[Ticket], Sequence[BlockReport]]"
    fills: list[ActiveRow] = field(default_factory=list)
    poisoned: list[ActiveRow] = field(default_factory=list)
    """Rows whose results are invalid, because this forward or one that it builds on has failed."""
    fault: Fault | None = None
    seconds: float = 1.0
    collected: bool = False

    def result(self) -> Sequence[BlockReport]:
        """See model.engine.backend.Launched."""
        return self.collect(self)


def row_of(item: ActiveRow | Prefix) -> ActiveRow:
    """Return the item, which must be a row."""
    assert isinstance(item, ActiveRow)
    return item


def error_of(ticket: Ticket) -> BaseException:
    """Return the error that the ticket's fault raises."""
    assert ticket.fault
    what = f"{ticket.kind} {ticket.number}"
    if ticket.fault.endswith("interrupt"):
        return KeyboardInterrupt(what)
    return NoMemoryError(what) if ticket.fault.endswith("oom") else ScriptedError(what)
