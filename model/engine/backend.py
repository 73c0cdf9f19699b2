"""Defines the interface between the loop and the code that runs the forwards: the real model
(model.engine.model_runner) or a stand-in. Does not import torch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from model.engine.sequence import ActiveRow, Prefix


class BlockReport(NamedTuple):
    """The state of a block that the loop must look at after a forward, because it is full, its row may have ended, or
    its logits were not finite."""

    row: ActiveRow
    ready: int
    """Number of committed positions before the first masked one."""
    complete: bool
    """Whether all positions of the block are committed."""
    may_end: bool
    """Whether the row may have ended: among the first `ready` tokens is an EOS, they reach max_new_tokens, or there are
    new ones and the row has stop strings."""
    broken: bool
    """Whether logits that the row needed were not finite; in AR mode those after the first `ready` tokens."""
    steps: int
    """Number of denoiser forwards that the block has taken; 0 in AR mode."""
    tokens: list[int]
    """Token ids of the block; only the first `ready` are valid."""
    confidences: list[float]
    """The confidence of each of `tokens`."""


class Launched(Protocol):
    """A forward that has been launched."""

    @property
    def seconds(self) -> float:
        """Return the duration of the forward in seconds; valid once `result` has returned."""

    def result(self) -> Sequence[BlockReport]:
        """Wait for the forward and return reports on the blocks that the loop must look at. Raises the error of the
        forward if it failed."""


Batch = Sequence[tuple[ActiveRow | Prefix, int]]
"""The rows and prefixes of a context forward, each with the number of its pending tokens that the forward takes."""


class Backend(Protocol):
    """The code that runs the forwards for a Loop. They run in the order of their launch, and nothing but
    `Launched.result` waits for them."""

    def add_slots(self, count: int) -> None:
        """Make room for `count` more rows. No forward may be in progress."""

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """Prepare for rows that have just got their slots; called before any other call for these rows."""

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """Begin a new block for each of these rows. In AR mode the block has `ar_tokens` tokens, or fewer if
        max_new_tokens leaves room for fewer."""

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Launched:
        """Launch a context forward over pieces of prompts and finished blocks together.

        fill: the rows in AR mode, which are the last ones of the batch; empty if there are none. For each of them the
        forward also predicts the token after those that it stores. If their blocks have more than one token, further
        forwards follow, each predicting one more token.
        """

    def denoise(self, rows: Sequence[ActiveRow]) -> Launched:
        """Launch a denoiser forward over the blocks that these rows have begun."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Return True if memory ran out, so that fewer rows may help; in that case also free the memory that the device
        allocator caches."""
