"""Watches whether block diffusion gains anything: where every block takes a forward a token, something is wrong.

A wrong scan does not crash. It leaves the denoiser so unsure that every step commits the one position that it must.
Each replica watches its own first blocks and tells at once. What was told to a driver that died is read off the parts.
"""

from collections.abc import Container, Iterable

from model.requests import Completion, GenerationParams
from pipeline.config.job import Job
from pipeline.core.events import WARNING
from pipeline.core.types import Totals, UnitResult

BLOCKS = 200
"""Blocks that a verdict takes."""


def may_gain(params: GenerationParams) -> bool:
    """Whether a block could take fewer forwards than it has tokens, and could take as many.

    Not where it has one token or a threshold of 1, which no probability exceeds; and with fewer steps than tokens it
    always takes fewer.
    """
    blocks = params.mode == "diffusion" and 1 < params.block_size <= params.steps_per_block
    return blocks and params.confidence_threshold < 1


class ForwardsWatch:
    """Counts blocks of one replica, from its first on, until one takes fewer forwards than it has tokens."""

    def __init__(self) -> None:
        self._blocks: int | None = 0  # None: the verdict is in

    def take(self, params: GenerationParams, completion: Completion) -> str | None:
        """The warning to give, once, when the first BLOCKS blocks have taken a forward a token.

        Whole blocks alone count: a row's last one may have ended early.
        """
        if self._blocks is None or not may_gain(params):
            return None
        whole = completion.steps_per_block[: len(completion.token_ids) // params.block_size]
        if any(steps < params.block_size for steps in whole):
            self._blocks = None
            return None
        self._blocks += len(whole)
        if self._blocks < BLOCKS:
            return None
        self._blocks = None
        return WARNING + _text(f"its first {BLOCKS} blocks took a denoiser forward for each token")


def slow_replicas(job: Job, results: Iterable[UnitResult], but: Container[str] = ()) -> list[str]:
    """A warning for each replica whose parts have no more tokens than denoiser forwards, BLOCKS blocks at least; none
    for those in `but`."""
    params = job.generation.params(())
    if not may_gain(params) or job.input.row_settings.confidence_threshold is not None:
        return []
    totals: dict[str, Totals] = {}
    for result in results:
        totals[result.replica] = totals.get(result.replica, Totals()) + result.totals
    return [
        f"replica {replica}: "
        + _text(f"{total.completion_tokens:,} tokens took {total.denoiser_forwards:,} denoiser forwards")
        for replica, total in sorted(totals.items())
        if replica not in but and total.denoiser_forwards >= max(BLOCKS * params.block_size, total.completion_tokens)
    ]


def _text(what: str) -> str:
    return (
        f"{what}, so block diffusion gains nothing: the kernels or the checkpoint may be wrong; if the texts are well, "
        "lower generation.confidence_threshold or use generation.mode: ar"
    )
