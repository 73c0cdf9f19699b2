"""Turns the prompts of rows into token ids."""

from collections.abc import Sequence
from typing import Protocol

from pipeline.core.types import Row
from pipeline.prompts.setup import PromptSetup


class TokenizerLike(Protocol):
    """The part of model.checkpoint.tokenizer.Tokenizer that prompts need."""

    def encode_batch(self, texts: list[str], *, bos_once: bool = False) -> Sequence[Sequence[int]]:
        """Return the token ids of each text, in which every text that spells a control token is one.

        With `bos_once`, the tokens that the tokenizer puts in front are not repeated if the text begins with them.
        """

    def encode_prompts(self, texts: list[str], control: list[tuple[tuple[int, int], ...]]) -> Sequence[Sequence[int]]:
        """Return the token ids of each text, in which only the given ranges of characters are control tokens."""


class EncoderLike(Protocol):
    """The part of PromptEncoder that its users need, so that tests can use a simpler one."""

    def encode(self, rows: Sequence[Row]) -> Sequence[Sequence[int]]:
        """Return the token ids of the prompt of each row, in the order of the rows."""


class PromptEncoder:
    """Encodes prompts with a checkpoint's tokenizer, as the setup of the job says."""

    def __init__(self, tokenizer: TokenizerLike, setup: PromptSetup) -> None:
        self._tokenizer, self._setup = tokenizer, setup

    def encode(self, rows: Sequence[Row]) -> Sequence[Sequence[int]]:
        """Return the token ids of the prompt of each row. A row without a prompt counts as one with an empty text."""
        texts = [row.prompt or "" for row in rows]
        if self._setup.rules == 1:
            return self._tokenizer.encode_batch(texts)
        if self._setup.special_tokens == "all":
            return self._tokenizer.encode_batch(texts, bos_once=True)
        return self._tokenizer.encode_prompts(texts, [row.control for row in rows])
