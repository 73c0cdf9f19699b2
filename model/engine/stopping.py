"""Finds where a row ends: at an EOS, a stop string, or its token limit, whichever comes first. Does not import
torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from model.requests import GenerationParams

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of a row: why it ended, and its final tokens and text."""

    reason: Literal["stop", "length"]
    token_ids: list[int]
    """The tokens up to and including the EOS or the token that completed the stop string; for `length`, the first
    max_new_tokens tokens."""
    text: str | None
    """The text before the EOS or the stop string, for `length` that of all tokens; None without a tokenizer."""


def find_end(tokens: Sequence[int], params: GenerationParams, decode: Decode | None, checked: int = 0) -> End | None:
    """Return the end of the row, or None if it has not ended yet.

    tokens: the generated tokens of the row up to its first masked position. checked: how many of them are already known
    not to end the row. decode: None if the checkpoint has no tokenizer; then `params.stop` must be empty.
    """
    eos = next((i for i in range(checked, len(tokens)) if tokens[i] in params.eos_ids), None)
    limit = len(tokens) if eos is None else eos
    limit = min(limit, params.max_new_tokens)
    ended_by_eos = eos is not None and eos < params.max_new_tokens
    if params.stop and decode and _may_stop(tokens[:limit], params.stop, decode, checked):
        stopped = _find_stop(tokens[:limit], params.stop, decode)
        if stopped is not None:
            return stopped
    if not ended_by_eos and limit < params.max_new_tokens:
        return None
    text = decode(tokens[:limit]) if decode else None
    kept = limit + 1 if ended_by_eos else limit
    return End("stop" if ended_by_eos else "length", list(tokens[:kept]), text)


def _may_stop(tokens: Sequence[int], stops: Sequence[str], decode: Decode, checked: int) -> bool:
    """Return False if no stop string can end after the first `checked` tokens, so that the whole text need not be
    searched.

    Only the tail of the text is decoded. The tail begins so far back that its checked part is longer than any stop
    string; the margin of 3 is there because a character that is cut at the beginning of the tail can decode to up to
    three replacement characters.
    """
    longest = max(map(len, stops)) + 3
    back = longest
    while back < checked and len(decode(tokens[checked - back : checked])) < longest:
        back *= 2  # some tokens have no text of their own: special tokens, parts of a character
    tail = decode(tokens[max(0, checked - back) :])
    return any(stop in tail for stop in stops)


def _find_stop(tokens: Sequence[int], stops: Sequence[str], decode: Decode) -> End | None:
    """Return the row's end at its first stop string, with the fewest tokens whose text holds one; None if the text
    holds no stop string."""
    text = decode(tokens)
    if not any(stop in text for stop in stops):
        return None
    low, high = 1, len(tokens)  # the text of the first `high` tokens holds a stop string
    while low < high:
        middle = (low + high) // 2
        if any(stop in decode(tokens[:middle]) for stop in stops):
            high = middle
        else:
            low = middle + 1
    text = decode(tokens[:high])
    return End("stop", list(tokens[:high]), text[: min(text.find(stop) for stop in stops if stop in text)])
