"""Defines protocols for what the unit runner needs from engine and tokenizer, so that tests can use fakes."""

from collections.abc import Sequence
from typing import Protocol

from model.requests import Completion, Request


class EngineLike(Protocol):
    """The part of model.Engine that the runner uses."""

    @property
    def waiting(self) -> int:
        """Return the number of requests that have no slot yet."""

    @property
    def max_rows(self) -> int:
        """Return the largest number of rows generated together. It falls if memory runs out."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run."""

    def step(self) -> Sequence[Completion]:
        """Run one step and return the rows that finished in it.

        Raises EngineError if the step fails; the error names the rows that were lost.
        """


class TokenizerLike(Protocol):
    """The part of a checkpoint's tokenizer that the unit loader uses."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...
