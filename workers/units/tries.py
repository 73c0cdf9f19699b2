"""Decides whether and how a row is generated again if its completion is a loop (`on_degenerate: retry`).

Each further try uses more careful settings:

    diffusion at its threshold -> diffusion at a threshold half way to 1 -> ar        (mock_ar -> ar; ar: no retry)

Every try uses the row's own key and seed. Its tokens are therefore those that a job with its mode and threshold would
give the row. They depend neither on the tries before it nor on the replica.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.requests import Completion, GenerationParams
from pipeline.core.repetition import DEGENERATE, repetition


@dataclass(frozen=True, slots=True)
class Try:
    """One generation of a row, with its settings and its completion."""

    params: GenerationParams
    """The settings of this try."""
    completion: Completion
    repetition: float | None
    """The share of the completion that is a loop (pipeline.core.repetition); None for an error without tokens."""

    @property
    def good(self) -> bool:
        """Return True if the completion is neither an error nor a loop (repetition of DEGENERATE or more)."""
        return self.completion.finish_reason != "error" and (self.repetition or 0.0) < DEGENERATE


def judge(params: GenerationParams, completion: Completion) -> Try:
    """Measure how much of the completion is a loop, and return the try with these settings and this completion."""
    nothing = completion.finish_reason == "error" and not completion.token_ids
    return Try(params, completion, None if nothing else repetition(completion.token_ids, params.eos_ids))


def next_params(tries: Sequence[Try]) -> GenerationParams | None:
    """Return the settings of the next try of a row after these tries, or None if it gets none.

    It gets none if its last try is good, its first one is an error, or the most careful settings have been tried. An
    error in a later try does not end the tries.
    """
    first = tries[0]
    if tries[-1].good or first.completion.finish_reason == "error":
        return None
    ladder = _ladder(first.params)
    return ladder[len(tries)] if len(tries) < len(ladder) else None


def _ladder(params: GenerationParams) -> list[GenerationParams]:
    """Return the settings of all tries that a row with these settings may get, the first one included."""
    ladder = [params]
    careful = replace(params, confidence_threshold=(1 + params.confidence_threshold) / 2)
    # With one step per block or one token per block, all tokens of a block are committed at once, and the threshold
    # changes nothing.
    matters = params.mode == "diffusion" and params.steps_per_block > 1 and params.block_size > 1
    if matters and careful.confidence_threshold > params.confidence_threshold:
        ladder.append(careful)
    if params.mode != "ar":
        ladder.append(replace(params, mode="ar"))
    return ladder


def best(tries: Sequence[Try]) -> Try:
    """Return the try that becomes the row's result: the first good one, else the one that loops least.

    It is an error only if all tries are errors.

    The times of its completion are summed over all tries, so that they show the whole time that the row took. Its
    counts (forwards, steps, confidences) are those of the returned try alone.
    """
    texts = [one for one in tries if one.completion.finish_reason != "error"] or tries
    kept = next((one for one in texts if one.good), None) or min(texts, key=lambda one: one.repetition or 0.0)
    if len(tries) == 1:
        return kept
    done = [one.completion for one in tries]
    completion = replace(
        kept.completion,
        queue_s=sum(one.queue_s for one in done),
        prefill_s=sum(one.prefill_s for one in done),
        denoise_s=sum(one.denoise_s for one in done),
        commit_s=sum(one.commit_s for one in done),
        latency_s=sum(one.latency_s for one in done),
    )
    return replace(kept, completion=completion)
