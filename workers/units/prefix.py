"""Finds the tokens that many prompts of a unit begin with, such as a template: the engine computes them only once."""

from array import array
from collections.abc import Collection, Iterator, Sequence

from model.runtime.page_allocator import PAGE_SIZE

FORWARD_TOKENS = 1024
"""Fixed cost of a forward, expressed in tokens: even for a few tokens it reads all weights. A new prefix needs a
forward of its own, so it must save more tokens than this."""


def has_prefix(prompt: "array[int]", prefix: "array[int]") -> bool:
    """Return True if the prompt begins with the prefix and is longer.

    It must be longer because the AR modes do not prefill a prompt's last token.
    """
    return len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix


def best_prefix(prompts: "Sequence[array[int]]", known: "Collection[array[int]]" = ()) -> "array[int]":
    """Return the prefix, in whole pages, that saves the most context tokens; an empty one if none saves any.

    A `known` prefix, from earlier units, is in the engine already. With n tokens in k prompts it saves n * k tokens. A
    new prefix must be computed first and saves n * (k - 1) - FORWARD_TOKENS. Of two equal savings a known prefix wins,
    then the shorter one. A few unusual prompts therefore do not change the choice, and neither does a page that a few
    prompts share by chance.
    """
    best, most = array("i"), 0
    for prefix in known:
        saved = len(prefix) * sum(has_prefix(prompt, prefix) for prompt in prompts)
        if saved > most:
            best, most = prefix, saved
    for tokens, group in _groups(prompts):
        saved = tokens * (len(group) - 1) - FORWARD_TOKENS
        if saved > most:
            best, most = group[0][:tokens], saved
    return best


def _groups(prompts: "Sequence[array[int]]") -> "Iterator[tuple[int, list[array[int]]]]":
    """Yield (n, prompts) for each group of two or more prompts that begin with the same n tokens and are longer.

    n takes every multiple of PAGE_SIZE, in ascending order, as long as such groups exist.
    """
    end, groups = 0, [list(prompts)]
    while groups:
        start, end = end, end + PAGE_SIZE
        split: list[list[array[int]]] = []
        for group in groups:  # its prompts agree up to `start`
            pages: dict[bytes, list[array[int]]] = {}
            for prompt in group:
                if len(prompt) > end:
                    pages.setdefault(prompt[start:end].tobytes(), []).append(prompt)
            split += [same for same in pages.values() if len(same) > 1]
        groups = split
        yield from ((end, group) for group in groups)
