"""What the completions of a setting are worth: how far they are AR's, how they loop, what they cost; and what a sample
of rows can say about all of them."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.requests import Completion
from pipeline.core.repetition import repetition

Z = 1.96
"""Standard errors on either side of an interval that holds the true value in 95 of 100 samples."""

MOST_WORTH = 10.0

Tokens = Sequence[int]


def similarity(one: Tokens, other: Tokens) -> float:
    """1 - the edit distance of two token sequences over the length of the longer one: 1.0 the same, 0.0 nothing shared.

    The distance is Levenshtein's: tokens to put in, take out or replace. Unlike the share of equal leading tokens it
    does not count everything behind the first difference as lost.
    """
    longer = max(len(one), len(other))
    if not longer:
        return 1.0
    start = equal_start(one, other)
    end = equal_start(one[start:][::-1], other[start:][::-1])
    return 1 - _distance(one[start : len(one) - end], other[start : len(other) - end]) / longer


def equal_start(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of the first items are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _distance(one: Tokens, other: Tokens) -> int:
    """Levenshtein's distance, a row of the table at a time (Wagner and Fischer 1974)."""
    shorter, longer = sorted((one, other), key=len)
    if not shorter:
        return len(longer)
    columns = np.arange(len(longer) + 1)
    tokens = np.asarray(longer)
    row: npt.NDArray[np.int64] = columns
    for number, token in enumerate(shorter, 1):
        best = np.minimum(row[:-1] + (tokens != token), row[1:] + 1)  # replaced or equal; put in
        best = np.concatenate([[number], best])
        row = np.minimum.accumulate(best - columns) + columns  # taken out, any number of them
    return int(row[-1])


@dataclass(frozen=True, slots=True)
class Share:
    """A mean of values from 0 to 1, with the interval that holds the true mean in 95 of 100 samples."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """`97% (91% to 99%)`; `100%` where it is known."""
        if self.low == self.high:
            return percent(self.mean)
        return f"{percent(self.mean)} ({percent(self.low)} to {percent(self.high)})"


def percent(share: float) -> str:
    """`97%`; another digit near 100, where it matters, and 100% only for all."""
    text = f"{share:.1%}" if share > 0.9 else f"{share:.0%}"
    return "99.9%" if text.startswith("100") and share < 1 else text.replace(".0%", "%")


def share_of(values: Sequence[float], weights: Sequence[float]) -> Share:
    """The weighted mean of values from 0 to 1, with Wilson's interval (1927).

    Values of 0 and 1 are counted as they are. Others vary less than a proportion with their mean, which makes them
    worth more rows, and unequal weights fewer: the interval is that of the effective number (Kish 1965). Not more than
    MOST_WORTH for each, as a sample without a failure says little of rare ones.
    """
    mean = _mean(values, weights)
    rows = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    variance = _mean([(value - mean) ** 2 for value in values], weights)
    worth = min(MOST_WORTH, mean * (1 - mean) / variance) if variance > 0 else 1.0
    return Share(mean, *wilson(mean, rows * max(1.0, worth)))


KNOWN = Share(1.0, 1.0, 1.0)
"""Of what is so by definition."""


def wilson(share: float, rows: float) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion that was seen in so many rows."""
    spread = Z * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    middle, scale = share + Z**2 / (2 * rows), 1 + Z**2 / rows
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def rows_to_tell(share: Share, limit: float, rows: int) -> int:
    """Rows that a sample needs, about, for the interval to end before the limit, as it is with so many rows."""
    gap = max(abs(share.mean - limit), 0.002)
    return math.ceil(rows * max(1.0, abs(share.mean - (share.low if share.mean > limit else share.high)) / gap) ** 2)


def difference(one: Sequence[float], other: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The mean of one - other over the same rows, and half its 95% interval: rows that are hard for both cancel out."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    mean = _mean(gaps, weights)
    variance = sum((weight * (gap - mean)) ** 2 for gap, weight in zip(gaps, weights, strict=True))
    return mean, Z * math.sqrt(variance) / sum(weights)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights)


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
