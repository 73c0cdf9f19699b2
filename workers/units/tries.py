"""The tries of a row: one whose completion is a loop may be generated again, more carefully.

    diffusion at its threshold -> diffusion at a threshold half way to 1 -> ar        (mock_ar -> ar; ar: nothing left)

A try has the row's own key and seed, so that its tokens are those of a job with that mode and threshold, whatever came
before and wherever the row runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.requests import Completion, GenerationParams
from pipeline.core.repetition import DEGENERATE, repetition


@dataclass(frozen=True, slots=True)
class Try:
    """What came of generating a row once."""

    params: GenerationParams
    completion: Completion
    repetition: float | None
    """See RowResult."""

    @property
    def good(self) -> bool:
        """Whether it is text, and no loop."""
        return self.completion.finish_reason != "error" and (self.repetition or 0.0) < DEGENERATE


def judge(params: GenerationParams, completion: Completion) -> Try:
    """The try that had these settings and gave this completion."""
    nothing = completion.finish_reason == "error" and not completion.token_ids
    return Try(params, completion, None if nothing else repetition(completion.token_ids, params.eos_ids))


def next_params(tries: Sequence[Try]) -> GenerationParams | None:
    """How to generate the row now; None: no more. A row whose first try is an error stays one."""
    first = tries[0]
    if tries[-1].good or first.completion.finish_reason == "error":
        return None
    ladder = _ladder(first.params)
    return ladder[len(tries)] if len(tries) < len(ladder) else None


def _ladder(params: GenerationParams) -> list[GenerationParams]:
    ladder = [params]
    careful = replace(params, confidence_threshold=(1 + params.confidence_threshold) / 2)
    # Where a step has no choice of what to commit, a threshold changes nothing.
    matters = params.mode == "diffusion" and params.steps_per_block > 1 and params.block_size > 1
    if matters and careful.confidence_threshold > params.confidence_threshold:
        ladder.append(careful)
    if params.mode != "ar":
        ladder.append(replace(params, mode="ar"))
    return ladder


def best(tries: Sequence[Try]) -> Try:
    """The first that is good, else the one that loops least; an error only where all are.

    Its seconds are those of all tries together, so that what was spent on the row is seen; its counts (forwards, steps,
    confidences) are its own.
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
