"""Measures the share of a completion that is a loop: the column `repetition`. Does not import torch.

Holtzman et al., "The Curious Case of Neural Text Degeneration" (ICLR 2020, arXiv 1904.09751; metrics/repetition.py of
their code) call a generation repetitive if it ends with a phrase of up to 90 tokens several times in a row. That is a
yes or no about the end of a text. This module looks for the same pattern, a phrase that follows itself directly, in the
whole completion, and measures it as a share. A loop that the model leaves again therefore counts, and so does a last
cycle that is cut off. Passages that differ in a single token are no loop, such as rows of a table, records of a list or
refrains with text between them. (Measures on n-grams, such as seq-rep-n of Welleck et al., ICLR 2020, arXiv 1908.04319,
count those too.)
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

MAX_CYCLE = 32
"""The length in tokens of the longest cycle (the phrase that repeats) that is found: about one long sentence."""
MIN_CYCLES = 3
"""The smallest number of cycles in a loop. Two are not enough, because people do say things twice."""
MIN_TOKENS = 16
"""The smallest number of tokens in a loop, however short its cycle is. It is the length of a block: a block that holds
nothing else is a loop, but `ha ha ha` or a row of dots is not."""
_LEAST_REPEATS = MIN_TOKENS - MIN_TOKENS // MIN_CYCLES
"""The smallest number of tokens in a loop that repeat an earlier one: all but the first cycle. Most short texts have
fewer repeated tokens in total and need no closer look."""
DEGENERATE = 0.25
"""The `repetition` (0 to 1) from which on a completion counts as degenerate.

With a byte-pair vocabulary, prose, source code, Markdown, CSV and JSON (indented or not) have 0.0. Correct texts above
the limit are tables of equal numbers: an identity matrix has 0.8, a CSV file with nine zeros in ten cells 0.6. If every
token is a byte, a line of dashes can make up 0.2 of a short Markdown table, and wide indentation most of a nested JSON
document. A model that loops rarely stops by itself. The limit is therefore above the share of text with ruled lines,
and low enough to find a loop that begins late.
"""
_NEEDED = np.array([max(MIN_CYCLES * n, MIN_TOKENS) - n for n in range(1, MAX_CYCLE + 1)])
"""For each cycle length n from 1 on: the number of consecutive tokens in the shortest loop that equal the token n
places before them."""


def repetition(token_ids: Sequence[int], eos_ids: Collection[int] = ()) -> float:
    """Return the share (0 to 1) of a completion's tokens that belong to a loop; 0.0 if there are no tokens.

    A loop is a stretch of at least MIN_CYCLES * n and at least MIN_TOKENS tokens in which each token but the first n
    equals the token n places before it, for some n from 1 to MAX_CYCLE. If the last token is one of `eos_ids`, it is
    not counted.
    """
    if token_ids and token_ids[-1] in eos_ids:
        token_ids = token_ids[:-1]
    count = len(token_ids)
    if count - len(set(token_ids)) < _LEAST_REPEATS:
        return 0.0
    longest = min(MAX_CYCLE, count // MIN_CYCLES)
    padded = np.array((-1,) * longest + tuple(token_ids))
    size = padded.itemsize
    # same[n - 1, i] is True if token i equals the token n places before it
    before = np.ndarray((longest, count), padded.dtype, padded, (longest - 1) * size, (-size, size))
    same = before == padded[longest:]
    needed = _NEEDED[:longest]
    looped = np.zeros(count, bool)
    for n in (np.flatnonzero(same.sum(axis=1) >= needed) + 1).tolist():
        for start, end in _runs(same[n - 1]):
            if end - start >= needed[n - 1]:
                looped[start - n : end] = True
        if looped.all():  # longer cycles, such as multiples of n, add nothing
            break
    return float(looped.mean())


def _runs(true: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Return (start, end) of each stretch of True, end excluded. The first item must be False."""
    edges = (np.flatnonzero(true[1:] != true[:-1]) + 1).tolist()
    return zip(edges[::2], [*edges[1::2], len(true)], strict=False)
