"""Defines the interface between the loop and the code that runs the forwards: the real model
(model.engine.model_runner) or a stand-in. Does not import torch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from model.engine.sequence import ActiveRow, Prefix


class BlockReport(NamedTuple):
    """A block that needs attention: it is full, its row may have ended, or its logits were not finite."""

    row: ActiveRow
    ready: int
    """Number of committed positions before the first masked one."""
    complete: bool
    may_end: bool
    """Whether the row may have ended: the block holds an EOS or reaches the row's limit, or the row has stop
    strings."""
    broken: bool
    """Whether logits that the row needed were not finite; in AR mode those after the first `ready` tokens."""
    steps: int
    """Number of denoiser forwards that the block has taken."""
    tokens: list[int]
    confidences: list[float]


class Launched(Protocol):
    """A forward that has been launched."""

    @property
    def seconds(self) -> float:
        """Return the duration of the forward in seconds; valid once the result is there."""

    def result(self) -> Sequence[BlockReport]:
        """Wait for the forward and return the blocks that need attention. Raises the error if the forward failed."""


Batch = Sequence[tuple[ActiveRow | Prefix, int]]
"""The rows and prefixes of a context forward, each with the number of its pending tokens that the forward takes."""


class Backend(Protocol):
    """The code that runs forwards. They run in the order of their launch, and only their `result` waits for them."""

    def add_slots(self, count: int) -> None:
        """Make room for `count` more rows. No forward may be in progress."""

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """Prepare for rows that have just got their slots."""

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """Begin a block for each of these rows; in AR mode of `ar_tokens` tokens, or fewer if the completion may take
        fewer."""

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Launched:
        """Launch a context forward over pieces of prompts and finished blocks together.

        fill: the rows in AR mode, which are the last ones of the batch. The forward predicts the token after those that
        it stores. If the blocks of these rows are longer, further forwards follow, each predicting one more token.
        """

    def denoise(self, rows: Sequence[ActiveRow]) -> Launched:
        """Launch a denoiser forward over the blocks of these rows."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Return True if memory ran out, so that fewer rows may help; in that case also free the memory that the device
        allocator caches."""
