"""Prepares prompts, and completions of AR and of another setting, to be shown side by side in a calibration's report.

Anybody may have written these texts, so control characters in them are made visible, and long texts are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.calibration.quality import Answer, agreement_of, equal_start, percent
from pipeline.calibration.sample import SampleRow
from pipeline.core.text import counted
from pipeline.pages.page import shown

PAIRS = 4
"""Maximum number of rows that are shown."""
ID_CHARS, PROMPT_CHARS, TEXT_CHARS, ALIKE_CHARS = 200, 800, 1500, 400
"""Maximum number of characters shown of an id, of a prompt, of the part in which two texts differ, and of each part in
which they are equal."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A row with two different completions, AR's and another one: their common parts, and the parts that differ."""

    id: str
    about: str
    """Length of the prompt, and agreement of the completions, in words."""
    prompt: str
    start: str
    """The common beginning of both completions; if it is long, only its end."""
    ar: str
    """The part of AR's completion between the common beginning and the common end."""
    other: str
    """The same part of the other completion."""
    end: str
    """The common end of both completions, cut if it is long."""


def pairs(rows: Sequence[SampleRow], ar: Sequence[Answer], other: Sequence[Answer]) -> list[Pair]:
    """Return at most PAIRS of the rows whose texts differ, evenly spaced from the least similar to the most similar.

    `ar`, `other`: AR's answers and those of another setting to the same rows, in the same order.
    """
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
        about=f"{counted(len(row.prompt_ids), 'prompt token')}, agreement {percent(alike)}",
        prompt=shown(row.prompt, PROMPT_CHARS),
        start=_end_of(one[:start]),
        ar=shown(one[start : len(one) - end], TEXT_CHARS),
        other=shown(two[start : len(two) - end], TEXT_CHARS),
        end=shown(one[len(one) - end :], ALIKE_CHARS),
    )


def _end_of(text: str) -> str:
    if len(text) <= ALIKE_CHARS:
        return shown(text, ALIKE_CHARS)
    return f"({len(text) - ALIKE_CHARS:,} equal characters) …{shown(text[-ALIKE_CHARS:], ALIKE_CHARS)}"


def _text(answer: Answer) -> str:
    return f"(failed: {answer.error})" if answer.error is not None else answer.text or ""
