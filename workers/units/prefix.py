"""Finds the tokens that many prompts of a unit begin with, such as a template's. The engine prefills them only once."""

from array import array
from collections.abc import Collection, Iterator, Sequence

from model.runtime.page_allocator import PAGE_SIZE

FORWARD_TOKENS = 1024
"""The assumed cost of a forward with hardly any tokens, which still reads all weights, in tokens of a larger forward. A
new prefix needs a forward of its own, so it must save more tokens than this."""


def has_prefix(prompt: "array[int]", prefix: "array[int]") -> bool:
    """Return True if the prompt begins with the prefix and is longer than it.

    A prompt that equals the prefix does not count, because the AR modes do not prefill a prompt's last token.
    """
    return len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix


def best_prefix(prompts: "Sequence[array[int]]", known: "Collection[array[int]]" = ()) -> "array[int]":
    """Return the prefix, in whole pages, that saves the most context tokens; an empty one if none saves any.

    A prefix of n tokens that is `known` from earlier units is in the engine already, so with k prompts it saves n * k
    tokens. A new one must be computed first and saves n * (k - 1) - FORWARD_TOKENS. If savings are equal, a known
    prefix wins over a new one, and a shorter new one over a longer one. A few unusual prompts therefore do not change
    the choice, and neither does a page that a few prompts share by chance.
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
    """Yield (n, prompts) for each group of two or more prompts that begin with the same n tokens and are longer than n.

    n is PAGE_SIZE, then each larger multiple of it, until there is no such group.
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
