"""Defines the interface between a preview and the replica that generates its rows."""

from collections.abc import Sequence
from typing import Protocol

from model.requests import Completion, Request
from pipeline.calibration.bench import Tick


class Generator(Protocol):
    """A replica of a job that returns completions instead of saving them. Its methods raise TwoTowerError if the
    replica cannot continue, and whatever a tick raises."""

    def start(self, tick: Tick) -> str:
        """Load the model, check it and make the engine, as a replica of a run does. Return one line about what was
        checked. Call this once, before `generate`."""

    def generate(self, requests: Sequence[Request], tick: Tick) -> Sequence[Completion]:
        """Generate the requests to their ends, and return their completions in the same order. The completion of a
        request that the engine refuses is an error with the reason."""

    def close(self) -> None:
        """Release the model and everything else. This may be called before `start`, after an error, and more than
        once."""
