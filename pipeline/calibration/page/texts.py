"""Prepares prompts and completions to be shown side by side in the report. They are untrusted, so control characters in
them are made visible, and long texts are cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.calibration.quality import Answer, agreement_of, equal_start, percent
from pipeline.calibration.sample import SampleRow
from pipeline.pages.page import shown

PAIRS = 4
ID_CHARS, PROMPT_CHARS, TEXT_CHARS, ALIKE_CHARS = 200, 800, 1500, 400
"""Maximum number of characters shown of an id, of a prompt, of the part in which two texts differ, and of each part in
which they are equal."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two completions of a row, prepared to be shown side by side."""

    id: str
    about: str
    prompt: str
    start: str
    """The common beginning of both completions; if it is long, only its end."""
    ar: str
    other: str
    end: str
    """The common end of both completions, cut if it is long."""


def pairs(rows: Sequence[SampleRow], ar: Sequence[Answer], other: Sequence[Answer]) -> list[Pair]:
    """Return at most PAIRS rows whose completions differ, evenly spaced from the least similar to the most similar."""
    differing = [
        (agreement_of(theirs, ours), index)
        for index, (ours, theirs) in enumerate(zip(ar, other, strict=True))
        if ours.text != theirs.text
    ]
    differing.sort()
    steps = min(PAIRS, len(differing))
    picked = [differing[(len(differing) - 1) * step // max(1, steps - 1)] for step in range(steps)]
    return [_pair(rows[index], ar[index], other[index], alike) for alike, index in picked]


def _pair(row: SampleRow, ar: Answer, other: Answer, alike: float) -> Pair:
    one, two = _text(ar), _text(other)
    start = equal_start(one, two)
    end = equal_start(one[start:][::-1], two[start:][::-1])
    return Pair(
        id=shown(row.id, ID_CHARS),
        about=f"{len(row.prompt_ids):,} prompt tokens, {percent(alike)} of the tokens alike",
        prompt=shown(row.prompt, PROMPT_CHARS),
        start=_end_of(one[:start]),
        ar=shown(one[start : len(one) - end], TEXT_CHARS),
        other=shown(two[start : len(two) - end], TEXT_CHARS),
        end=shown(one[len(one) - end :], ALIKE_CHARS),
    )


def _end_of(text: str) -> str:
    if len(text) <= ALIKE_CHARS:
        return shown(text, ALIKE_CHARS)
    return f"({len(text) - ALIKE_CHARS:,} characters alike) …{shown(text[-ALIKE_CHARS:], ALIKE_CHARS)}"


def _text(answer: Answer) -> str:
    return f"(failed: {answer.error})" if answer.error is not None else answer.text or ""
