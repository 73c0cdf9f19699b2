"""What the completions of a setting are worth: how far they are AR's, how they loop, what they cost."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from model.params import Completion
from model.repetition import repetition
from pipeline.calibration.agreement import KNOWN, Share, share_of, similarity


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion, as much of it as is kept."""

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str
    error: str | None
    prompt_tokens: int
    denoiser_forwards: int
    steps_per_block: tuple[int, ...]
    repetition: float


@dataclass(frozen=True, slots=True)
class Answers:
    """Of a setting, for each row of the sample in its order."""

    rows: tuple[Answer, ...]
    """As the job would make them."""
    greedy: tuple[Answer, ...]
    """At temperature 0; the same object where the job does not sample."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a setting, over the sample; means are weighted so that they stand for all rows."""

    agreement: Share
    """Mean similarity (see there) of the greedy completions to AR's: 1.0 where all tokens are the same."""
    exact: Share
    """Share of rows whose greedy text is AR's to the letter."""
    similarities: tuple[float, ...]
    """Of each row."""
    repetition: float
    tokens_per_row: float
    prompt_tokens_per_row: float
    tokens_per_forward: float | None
    """Denoiser forwards; None in AR mode."""
    steps_per_block: float | None
    stopped: float
    """Share of rows that ended by themselves, `stop`."""
    cut: float
    """Share of rows that used up max_new_tokens, `length`."""
    errors: float


def to_answer(completion: Completion, eos_ids: Collection[int]) -> Answer:
    """What is kept of a completion."""
    return Answer(
        completion.text,
        completion.token_ids,
        completion.finish_reason,
        completion.error,
        completion.prompt_tokens,
        completion.denoiser_forwards,
        completion.steps_per_block,
        repetition(completion.token_ids, eos_ids),
    )


def judge(answers: Answers, reference: Answers, weights: Sequence[float]) -> Quality:
    """The quality of a setting; `reference` are AR's answers to the same rows."""
    rows, total = answers.rows, sum(weights)

    def mean(value: Callable[[Answer], float]) -> float:
        return sum(value(row) * weight for row, weight in zip(rows, weights, strict=True)) / total

    pairs = list(zip(answers.greedy, reference.greedy, strict=True))
    similarities = [agreement_of(one, other) for one, other in pairs]
    exact = [float(one.error is None and one.text == other.text) for one, other in pairs]
    forwards, blocks = sum(row.denoiser_forwards for row in rows), sum(len(row.steps_per_block) for row in rows)
    return Quality(
        agreement=KNOWN if answers is reference else share_of(similarities, weights),
        exact=KNOWN if answers is reference else share_of(exact, weights),
        similarities=tuple(similarities),
        repetition=mean(lambda row: row.repetition),
        tokens_per_row=mean(lambda row: len(row.token_ids)),
        prompt_tokens_per_row=mean(lambda row: row.prompt_tokens),
        tokens_per_forward=sum(len(row.token_ids) for row in rows) / forwards if forwards else None,
        steps_per_block=sum(sum(row.steps_per_block) for row in rows) / blocks if blocks else None,
        stopped=mean(lambda row: row.finish_reason == "stop"),
        cut=mean(lambda row: row.finish_reason == "length"),
        errors=mean(lambda row: row.finish_reason == "error"),
    )


def agreement_of(answer: Answer, reference: Answer) -> float:
    """The similarity of their tokens; 0 where a row failed."""
    if answer.error is not None or reference.error is not None:
        return 0.0
    return similarity(answer.token_ids, reference.token_ids)
