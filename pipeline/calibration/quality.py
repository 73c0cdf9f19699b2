"""Measures the quality of a setting from its completions (agreement with AR, loops, lengths), with intervals that say
how certain these results of a sample are."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.requests import Completion
from pipeline.core.repetition import repetition

Z = 1.96
"""Half the width of a 95% interval, in standard errors."""
MOST_WORTH = 10.0
"""The most rows with a value of 0 or 1 that one row with a value in between may count as (see `share_of`)."""

Tokens = Sequence[int]
"""Token ids of a completion."""


def similarity(one: Tokens, other: Tokens) -> float:
    """Return 1 minus the edit distance of two token sequences divided by the length of the longer one.

    1.0 means that they are the same, or both empty; 0.0 that they share nothing. The distance is Levenshtein's: the
    smallest number of tokens to insert, delete or replace. Unlike the share of equal leading tokens, it does not count
    everything after the first difference as lost.
    """
    longer = max(len(one), len(other))
    if not longer:
        return 1.0
    start = equal_start(one, other)
    end = equal_start(one[start:][::-1], other[start:][::-1])
    return 1 - _distance(one[start : len(one) - end], other[start : len(other) - end]) / longer


def equal_start(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of items that are equal at the beginning of both sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _distance(one: Tokens, other: Tokens) -> int:
    """Return Levenshtein's distance, computed one row of the table at a time (Wagner and Fischer 1974)."""
    shorter, longer = sorted((one, other), key=len)
    if not shorter:
        return len(longer)
    columns = np.arange(len(longer) + 1)
    tokens = np.asarray(longer)
    row: npt.NDArray[np.int64] = columns
    for number, token in enumerate(shorter, 1):
        best = np.minimum(row[:-1] + (tokens != token), row[1:] + 1)  # replace or keep a token; insert one
        best = np.concatenate([[number], best])
        row = np.minimum.accumulate(best - columns) + columns  # delete any number of tokens
    return int(row[-1])


@dataclass(frozen=True, slots=True)
class Share:
    """A mean over the sample of values from 0 to 1, with its 95% interval: in 95 of 100 samples it holds the true
    mean."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return a text such as `97% (91% to 99%)`, or only the mean if the interval has no width."""
        if self.low == self.high:
            return percent(self.mean)
        return f"{percent(self.mean)} ({percent(self.low)} to {percent(self.high)})"


def percent(share: float) -> str:
    """Return a text such as `87%` or, above 90%, `97.3%`. It is `100%` only if the share is exactly 1."""
    text = f"{share:.1%}" if share > 0.9 else f"{share:.0%}"
    return "99.9%" if text.startswith("100") and share < 1 else text.replace(".0%", "%")


def share_of(values: Sequence[float], weights: Sequence[float]) -> Share:
    """Return the weighted mean of one value from 0 to 1 per row, with Wilson's 95% interval (1927).

    The interval is computed for an effective number of rows (Kish 1965). Unequal weights lower this number. Values
    between 0 and 1 raise it, because they vary less than a proportion with the same mean, but not to more than
    MOST_WORTH times: a sample without a failure says little about rare failures.
    """
    mean = _mean(values, weights)
    rows = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    variance = _mean([(value - mean) ** 2 for value in values], weights)
    worth = min(MOST_WORTH, mean * (1 - mean) / variance) if variance > 0 else 1.0
    return Share(mean, *wilson(mean, rows * max(1.0, worth)))


KNOWN = Share(1.0, 1.0, 1.0)
"""A share that is 1 by definition, such as AR's agreement with itself."""


def wilson(share: float, rows: float) -> tuple[float, float]:
    """Return (low, high) of Wilson's 95% interval (1927) of a proportion that was observed in `rows` rows."""
    spread = Z * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    middle, scale = share + Z**2 / (2 * rows), 1 + Z**2 / rows
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def rows_to_tell(share: Share, limit: float, rows: int) -> int:
    """Return about how many rows a sample needs so that the interval of this share no longer holds `limit`.

    `share` was measured on `rows` rows, and the result is at least that many. It assumes that the mean stays and the
    interval narrows with the square root of the number of rows.
    """
    gap = max(abs(share.mean - limit), 0.002)
    return math.ceil(rows * max(1.0, abs(share.mean - (share.low if share.mean > limit else share.high)) / gap) ** 2)


def difference(one: Sequence[float], other: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return the weighted mean of `one` - `other`, two values of each row, and half the width of its 95% interval.

    Rows that are hard for both do not widen the interval, because each row is compared with itself.
    """
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    mean = _mean(gaps, weights)
    variance = sum((weight * (gap - mean)) ** 2 for gap, weight in zip(gaps, weights, strict=True))
    return mean, Z * math.sqrt(variance) / sum(weights)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights)


@dataclass(frozen=True, slots=True)
class Answer:
    """The fields of a completion that a calibration saves, and its repetition."""

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str
    error: str | None
    prompt_tokens: int
    denoiser_forwards: int
    steps_per_block: tuple[int, ...]
    repetition: float
    """Share of the tokens that belong to a loop (pipeline.core.repetition)."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a setting to all rows of the sample, in the order of the rows."""

    rows: tuple[Answer, ...]
    """The answers as the job would make them."""
    greedy: tuple[Answer, ...]
    """The answers at temperature 0, which are compared with AR's; the same object as `rows` if the job does not
    sample."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of a setting over the sample.

    Agreement, exact and similarities are of the greedy completions; everything else is of the completions as the job
    makes them. Means over rows are weighted, so that they represent all rows of the job; tokens_per_forward and
    steps_per_block are not weighted.
    """

    agreement: Share
    """Mean similarity of the completions to AR's (see `agreement_of`); 1.0 if all tokens are the same."""
    exact: Share
    """Share of rows whose text is exactly AR's; a failed row counts as different."""
    similarities: tuple[float, ...]
    """The similarity of each row of the sample, in its order."""
    repetition: float
    """Mean share of a completion that is a loop."""
    tokens_per_row: float
    prompt_tokens_per_row: float
    tokens_per_forward: float | None
    """Tokens of all rows divided by their denoiser forwards; None in AR mode."""
    steps_per_block: float | None
    """Mean denoiser forwards per block; None in AR mode."""
    stopped: float
    """Share of rows that ended by themselves (finish reason `stop`)."""
    cut: float
    """Share of rows that used up max_new_tokens (finish reason `length`)."""
    errors: float
    """Share of rows that failed (finish reason `error`)."""


def to_answer(completion: Completion, eos_ids: Collection[int]) -> Answer:
    """Return the fields of a completion that are saved, and its repetition, which ignores a last token in `eos_ids`."""
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
    """Return the quality of a setting from its answers and AR's answers to the same rows.

    `weights`: the share of the job's rows that each row represents. If `answers` is `reference` itself, the agreement
    is 1 without an interval, even if rows failed.
    """
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
    """Return the similarity of the tokens of two answers to a row, or 0 if the row failed in one of them."""
    if answer.error is not None or reference.error is not None:
        return 0.0
    return similarity(answer.token_ids, reference.token_ids)
