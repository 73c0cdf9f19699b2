"""Warns if block diffusion gains nothing, that is, if every block takes one denoiser forward per token.

This is the sign of a wrong Mamba scan. It does not crash, but makes the denoiser so unsure that every step commits only
the one position that it must commit. Each replica checks its own first blocks and warns at once. Warnings that were
reported to a driver that died are lost, so the totals of the parts are checked at the end of a job as well.
"""

from collections.abc import Container, Iterable

from model.requests import Completion, GenerationParams
from pipeline.config.job import Job
from pipeline.core.events import WARNING
from pipeline.core.types import Totals, UnitResult

BLOCKS = 200
"""Number of blocks that must have taken one forward per token before a warning is given."""


def may_gain(params: GenerationParams) -> bool:
    """Return whether a block may take fewer denoiser forwards than it has tokens, or as many, depending on the model.

    False in the AR modes, if a block has one token, and if the threshold is 1, which no probability exceeds. False also
    if there are fewer steps than tokens, because then every block takes fewer forwards anyway.
    """
    blocks = params.mode == "diffusion" and 1 < params.block_size <= params.steps_per_block
    return blocks and params.confidence_threshold < 1


class ForwardsWatch:
    """A watch over the first blocks of one replica. It warns once if BLOCKS of them took one denoiser forward per
    token, and ends as soon as one block takes fewer."""

    def __init__(self) -> None:
        self._blocks: int | None = 0  # blocks seen so far, all with one forward per token; None: ended

    def take(self, params: GenerationParams, completion: Completion) -> str | None:
        """Take a row that has ended. Return the text of a warning, with the prefix WARNING, if the first BLOCKS blocks
        took one forward per token; else None, and always None after the first warning.

        Only complete blocks count, because the last block of a row may have ended early. Rows for which `may_gain` is
        false do not count.
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
        return WARNING + _text(f"its first {BLOCKS} blocks took one denoiser forward per token")


def slow_replicas(job: Job, results: Iterable[UnitResult], but: Container[str] = ()) -> list[str]:
    """Return a warning for each replica whose parts took at least as many denoiser forwards as they hold tokens.

    Replicas with fewer forwards than BLOCKS blocks have tokens are left out, and so are those named in `but`, which
    have warned already. The list is empty if rows may have a confidence_threshold of their own, or if `may_gain` is
    false for the job.
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
        f"{what}, so block diffusion gains nothing: the kernels or the checkpoint may be wrong; if the texts are good, "
        "lower generation.confidence_threshold or use generation.mode: ar"
    )
