"""The seam between the loop and what computes: the real model (model.forwards), or a stand-in. Free of torch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from model.lanes import ActiveRow, Prefix


class Seen(NamedTuple):
    """A block that needs attention: it is full, or its row may have ended."""

    row: ActiveRow
    ready: int
    """Positions committed with nothing masked before them."""
    complete: bool
    may_end: bool
    """It holds an EOS or reaches the row's limit, or the row has stop strings."""
    broken: bool
    """Logits that the row needed were not finite."""
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


class Backend(Protocol[H]):
    """What computes. Forwards run in the order of their launch; nothing here waits but `wait` and `collect`."""

    def add_slots(self, count: int) -> None:
        """Makes room for more rows. Nothing is under way."""

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """These rows have got their slots."""

    def begin(self, rows: Sequence[ActiveRow]) -> None:
        """Each of these rows begins a block."""

    def prefill(self, batch: Sequence[tuple[ActiveRow | Prefix, int]]) -> H:
        """Launches a context forward over the first `count` pending tokens of each."""

    def extend(self, rows: Sequence[ActiveRow]) -> H:
        """Launches a context forward over the rows' pending tokens; it fills the blocks of AR rows."""

    def denoise(self, rows: Sequence[ActiveRow]) -> H:
        """Launches a denoiser forward over the rows' blocks."""

    def done(self, handle: H) -> bool:
        """Whether it has ended, well or not."""

    def wait(self, handle: H) -> None:
        """Returns when it has ended, well or not."""

    def collect(self, handle: H) -> Sequence[Seen]:
        """What a forward that has ended predicted: the blocks that need attention. Raises what went wrong in it."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether fewer rows could help; gives back what the device allocator holds if so."""
