"""The scripted forwards of the loop's tests: what each was given, and how it may fail. Free of torch."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from model.engine.loop import Kind
from model.engine.sequence import ActiveRow, Prefix

Fault = Literal["launch", "collect", "launch oom", "collect oom", "launch interrupt", "collect interrupt"]


class ScriptedError(RuntimeError):
    """A forward that failed by script."""


class NoMemoryError(RuntimeError):
    """A forward that found no memory, by script."""


class Launch(NamedTuple):
    """What a forward was given: in one of the context, pieces of prompts and then finished blocks; else only blocks."""

    kind: Kind
    pieces: list[tuple[ActiveRow | Prefix, int]]
    blocks: list[tuple[ActiveRow | Prefix, int]]

    @property
    def work(self) -> list[tuple[ActiveRow | Prefix, int]]:
        """Rows and prefixes, and the tokens of each."""
        return self.pieces + self.blocks


@dataclass(slots=True, eq=False)
class Ticket:
    """A scripted forward. It takes a second."""

    kind: Kind
    number: int
    fills: list[ActiveRow] = field(default_factory=list)
    poisoned: list[ActiveRow] = field(default_factory=list)
    """Rows that it computed behind a forward that failed."""
    fault: Fault | None = None
    seconds: float = 1.0
    collected: bool = False


def row_of(item: ActiveRow | Prefix) -> ActiveRow:
    """The item, which is no prefix."""
    assert isinstance(item, ActiveRow)
    return item


def error_of(ticket: Ticket) -> BaseException:
    """What its fault raises."""
    assert ticket.fault
    what = f"{ticket.kind} {ticket.number}"
    if ticket.fault.endswith("interrupt"):
        return KeyboardInterrupt(what)
    return NoMemoryError(what) if ticket.fault.endswith("oom") else ScriptedError(what)
