"""Defines what the unit runner needs of the engine and the tokenizer, so that tests can use simpler ones."""

from collections.abc import Sequence
from typing import Protocol

from model.requests import Completion, Request


class EngineLike(Protocol):
    """The methods of model.Engine that the runner uses. Only one thread submits and steps."""

    @property
    def waiting(self) -> int:
        """Return the number of submitted requests that have no slot yet."""

    @property
    def max_rows(self) -> int:
        """Return the largest number of rows that the engine generates together now.

        It falls if memory runs out, and may rise again later.
        """

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run on this engine."""

    def step(self) -> Sequence[Completion]:
        """Run one step and return the completions of the rows that ended in it.

        Raises EngineError if the step fails. The error names the rows that were lost, and holds the completions of the
        rows that had ended before.
        """


class TokenizerLike(Protocol):
    """The part of a checkpoint's tokenizer that the unit loader uses."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Return the token ids of each text, in the order of the texts."""
