"""Defines what the unit runner needs of the engine, so that tests can use a simpler one."""

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
