"""The tokens that many prompts of a unit begin with, such as a template: the engine computes them once."""

from array import array
from collections.abc import Collection, Iterator, Sequence

from model.runtime.page_allocator import PAGE_SIZE

FORWARD_TOKENS = 1024
"""What a forward costs beside its tokens, in tokens: it reads the weights, however few they are. A new prefix has one
of its own, so it has to save more than this."""


def has_prefix(prompt: "array[int]", prefix: "array[int]") -> bool:
    """Whether the prompt is the prefix and more. More, because the AR modes keep a prompt's last token back."""
    return len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix


def best_prefix(prompts: "Sequence[array[int]]", known: "Collection[array[int]]" = ()) -> "array[int]":
    """The prefix, in whole pages, that saves the most tokens of context; empty where none saves any.

    With n tokens in k of the prompts that is n * k, less n and FORWARD_TOKENS where it has to be computed: a `known`
    one, of the units before, is in the engine already. What saves as much as a known or shorter one gives way to it.
    A few odd prompts thus do not matter to the others, nor does a page that a few prompts share by chance.
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
    """(n, the prompts that begin with the same n tokens), two at least, for every whole number of pages n."""
    end, groups = 0, [list(prompts)]
    while groups:
        start, end = end, end + PAGE_SIZE
        split: list[list[array[int]]] = []
        for group in groups:  # which agree up to `start`
            pages: dict[bytes, list[array[int]]] = {}
            for prompt in group:
                if len(prompt) > end:
                    pages.setdefault(prompt[start:end].tobytes(), []).append(prompt)
            split += [same for same in pages.values() if len(same) > 1]
        groups = split
        yield from ((end, group) for group in groups)
