"""Decides whether and how a row is generated again if its completion is a loop. Each further try is more careful:

    diffusion at its threshold -> diffusion at a threshold half way to 1 -> ar        (mock_ar -> ar; ar: no retry)

Every try uses the row's own key and seed. Its tokens are therefore those of a job with that mode and threshold; they do
not depend on the tries before it or on the replica.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.requests import Completion, GenerationParams
from pipeline.core.repetition import DEGENERATE, repetition


@dataclass(frozen=True, slots=True)
class Try:
    """The result of generating a row once."""

    params: GenerationParams
    completion: Completion
    repetition: float | None
    """Share of the completion that is a loop (see RowResult); None for an error without tokens."""

    @property
    def good(self) -> bool:
        """Return True if the try is neither an error nor a loop."""
        return self.completion.finish_reason != "error" and (self.repetition or 0.0) < DEGENERATE


def judge(params: GenerationParams, completion: Completion) -> Try:
    """Return the try with these settings and this completion, and with its repetition measured."""
    nothing = completion.finish_reason == "error" and not completion.token_ids
    return Try(params, completion, None if nothing else repetition(completion.token_ids, params.eos_ids))


def next_params(tries: Sequence[Try]) -> GenerationParams | None:
    """Return the settings of the row's next try, or None if there is no next try.

    There is none after a good try, after an error in the first try, and after the most careful settings.
    """
    first = tries[0]
    if tries[-1].good or first.completion.finish_reason == "error":
        return None
    ladder = _ladder(first.params)
    return ladder[len(tries)] if len(tries) < len(ladder) else None


def _ladder(params: GenerationParams) -> list[GenerationParams]:
    ladder = [params]
    careful = replace(params, confidence_threshold=(1 + params.confidence_threshold) / 2)
    # If a step cannot choose which tokens to commit, a threshold changes nothing.
    matters = params.mode == "diffusion" and params.steps_per_block > 1 and params.block_size > 1
    if matters and careful.confidence_threshold > params.confidence_threshold:
        ladder.append(careful)
    if params.mode != "ar":
        ladder.append(replace(params, mode="ar"))
    return ladder


def best(tries: Sequence[Try]) -> Try:
    """Return the first good try, else the one that loops least, or an error if all tries are errors.

    The seconds of its completion are the sums over all tries, so that they show the whole time spent on the row; the
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
