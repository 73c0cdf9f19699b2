"""Warns if block diffusion gains nothing, that is, if every block takes one denoiser forward per token.

This is the sign of a wrong scan, which does not crash: it only makes the denoiser so unsure that every step commits
just the one position that it must commit. Each replica checks its own first blocks and warns at once. Warnings that
were reported to a driver that died are lost, so the totals of the parts are checked at the end of a job as well.
"""

from collections.abc import Container, Iterable

from model.requests import Completion, GenerationParams
from pipeline.config.job import Job
from pipeline.core.events import WARNING
from pipeline.core.types import Totals, UnitResult

BLOCKS = 200
"""Number of blocks that are needed before a warning is given."""


def may_gain(params: GenerationParams) -> bool:
    """Return whether a block can take fewer denoiser forwards than it has tokens, and can also take as many.

    False in the AR modes, if a block has one token, and if the threshold is 1, which no probability exceeds. False also
    if there are fewer steps than tokens, because then every block takes fewer forwards anyway.
    """
    blocks = params.mode == "diffusion" and 1 < params.block_size <= params.steps_per_block
    return blocks and params.confidence_threshold < 1


class ForwardsWatch:
    """A check of one replica's first blocks, which ends when a block takes fewer forwards than it has tokens."""

    def __init__(self) -> None:
        self._blocks: int | None = 0  # None when the check has ended

    def take(self, params: GenerationParams, completion: Completion) -> str | None:
        """Return a warning, once, if the first BLOCKS blocks took one forward per token; else None.

        Only complete blocks count, because the last block of a row may have ended early.
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
    """Return a warning for each replica whose parts hold no more tokens than they took denoiser forwards.

    A replica needs at least BLOCKS blocks' worth of forwards; replicas in `but` are left out. The list is empty if the
    rows may bring a confidence_threshold of their own, or if may_gain is false for the job.
    """
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
