"""How much of a completion is a loop: the `repetition` of a row. Free of torch.

Holtzman et al., "The Curious Case of Neural Text Degeneration" (ICLR 2020, arXiv 1904.09751; metrics/repetition.py of
their code) count a generation as repeating where it ends with a phrase of up to 90 tokens several times in a row. That
is a yes or no about the end of a text. Here the same fact, a phrase that follows itself at once, is looked for in the
whole completion, and measured as a share: a loop that the model leaves again counts, and so does a last cycle that is
cut off. What differs in a single token is no loop: rows of a table, records of a list, refrains with text between them.
(The n-gram measures, such as seq-rep-n of Welleck et al., ICLR 2020, arXiv 1908.04319, count those as well.)
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

MAX_CYCLE = 32
"""Tokens of the longest cycle that is looked for: a long sentence."""
MIN_CYCLES = 3
"""Cycles of a loop at least: people say things twice."""
MIN_TOKENS = 16
"""Tokens of a loop at least, however short its cycle is: a block of the denoiser that holds nothing else is one, `ha ha
ha` or a row of dots is none."""
_LEAST_REPEATS = MIN_TOKENS - MIN_TOKENS // MIN_CYCLES
"""Tokens of a loop that stand before in it, at least: all but its first cycle. Most short texts have fewer in all."""
DEGENERATE = 0.25
"""A completion counts as degenerate from this share on.

Prose, source code, Markdown, CSV and JSON (indented or not) have 0.0 in every window of 64 to 800 tokens of a
byte-pair vocabulary. What is above it without a fault are numbers that do repeat: an identity matrix has 0.8, CSV of
nine zeros in ten 0.6. Where a token is a byte, a line of dashes makes up to 0.2 of a short Markdown table, and wide
indentation most of a nested JSON document. A model that loops seldom stops by itself: greedy AR of `builtin:noise`
over 200 tokens had one loop in 48 rows, 0.54 of it. So the share is above what ruled text has, and low enough for a
loop that begins late.
"""
_NEEDED = np.array([max(MIN_CYCLES * n, MIN_TOKENS) - n for n in range(1, MAX_CYCLE + 1)])
"""Tokens in a row that are the one n before them, in the shortest loop of each n."""


def repetition(token_ids: Sequence[int], eos_ids: Collection[int] = ()) -> float:
    """The share (0 to 1) of the tokens that stand in a loop; 0.0 where there are none.

    A loop is a stretch of tokens of which each is equal to the one n before it, but for the first n, for an n of 1 to
    MAX_CYCLE; it has MIN_CYCLES * n tokens at least, and MIN_TOKENS. A last token that is one of `eos_ids` does not
    count.
    """
    if token_ids and token_ids[-1] in eos_ids:
        token_ids = token_ids[:-1]
    count = len(token_ids)
    if count - len(set(token_ids)) < _LEAST_REPEATS:
        return 0.0
    longest = min(MAX_CYCLE, count // MIN_CYCLES)
    padded = np.array((-1,) * longest + tuple(token_ids))
    size = padded.itemsize
    # same[n - 1, i]: token i is the one n before it
    before = np.ndarray((longest, count), padded.dtype, padded, (longest - 1) * size, (-size, size))
    same = before == padded[longest:]
    needed = _NEEDED[:longest]
    looped = np.zeros(count, bool)
    for n in (np.flatnonzero(same.sum(axis=1) >= needed) + 1).tolist():
        for start, end in _runs(same[n - 1]):
            if end - start >= needed[n - 1]:
                looped[start - n : end] = True
        if looped.all():  # multiples of n find the same
            break
    return float(looped.mean())


def _runs(true: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where stretches of True begin and end; the first item is False."""
    edges = (np.flatnonzero(true[1:] != true[:-1]) + 1).tolist()
    return zip(edges[::2], [*edges[1::2], len(true)], strict=False)
