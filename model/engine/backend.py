"""The seam between the loop and what computes: the real model (model.engine.model_runner), or a stand-in. Free of
torch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from model.engine.sequence import ActiveRow, Prefix


class BlockReport(NamedTuple):
    """A block that needs attention: it is full, or its row may have ended."""

    row: ActiveRow
    ready: int
    """Positions committed with nothing masked before them."""
    complete: bool
    may_end: bool
    """It holds an EOS or reaches the row's limit, or the row has stop strings."""
    broken: bool
    """Logits that the row needed were not finite; in AR mode those behind the first `ready` tokens."""
    steps: int
    """Denoiser forwards that the block has taken."""
    tokens: list[int]
    confidences: list[float]


class Timed(Protocol):
    """A forward under way."""

    @property
    def seconds(self) -> float:
        """What it took; to be asked when it has come back."""


H = TypeVar("H", bound=Timed)


Batch = Sequence[tuple[ActiveRow | Prefix, int]]
"""Rows and prefixes, and how many of their pending tokens a context forward takes."""


class Backend(Protocol[H]):
    """What computes. Forwards run in the order of their launch; nothing here waits but `collect`."""

    def add_slots(self, count: int) -> None:
        """Makes room for more rows. Nothing is under way."""

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """These rows have got their slots."""

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """Each of these rows begins a block; one in AR mode of `ar_tokens`, or of what it may still take."""

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> H:
        """Launches a context forward: pieces of prompts and finished blocks together.

        fill: rows in AR mode, the last ones of the batch; it predicts the token behind those that it stores, and where
        their blocks are longer it goes on with that one, a forward a token.
        """

    def denoise(self, rows: Sequence[ActiveRow]) -> H:
        """Launches a denoiser forward over the rows' blocks."""

    def collect(self, handle: H) -> Sequence[BlockReport]:
        """Waits for a forward -> the blocks that need attention. Raises what went wrong in it."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether fewer rows could help; gives back what the device allocator holds if so."""
