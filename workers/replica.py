"""A replica: one loaded model and its unit runner, in a process of its own (an actor of workers.pool) or in this one
(workers.local_pool). It knows no Ray. Whatever is raised inside ends here, as a report.
"""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from model.errors import TwoTowerError
from pipeline.dispatch import UnitProgress
from pipeline.types import Assignment
from workers.unit_runner import Outcome, UnitRunner

MakeRunner = Callable[[str], UnitRunner]
"""Loads the model and makes the runner of the replica with this name; picklable, as it travels to the actor."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a call of a replica tells the driver: counts, never rows."""

    outcomes: tuple[Outcome, ...] = ()
    progress: tuple[UnitProgress, ...] = ()
    fatal: str | None = None
    """Why the replica can do no more: it is to be thrown away, with all that it holds."""
    refused: bool = False
    """It did not start, with one of the project's own errors."""


class Replica:
    """Calls of `start` and `work` come one at a time; `assign` may come at any moment, so that a freed replica does
    not wait for its next unit until a running `work` returns."""

    def __init__(self, name: str, make_runner: MakeRunner) -> None:
        self._name, self._make_runner = name, make_runner
        self._runner: UnitRunner | None = None
        self._fatal = f"replica {name} was not started"

    def start(self) -> Report:
        """Load the model. Not part of the constructor, because Ray gives a failed constructor's error as text only."""
        try:
            self._runner = self._make_runner(self._name)
        except Exception as error:  # the worker's boundary: the reason goes to the driver, the process is thrown away
            return self._die(error, refused=isinstance(error, TwoTowerError))
        return Report()

    def assign(self, work: Assignment) -> None:
        """Take a unit; a dead replica takes none, its next report says so."""
        if self._runner is not None:
            try:
                self._runner.add(work)
            except Exception as error:  # the worker's boundary: nobody waits for this call's result
                self._die(error)

    def work(self, seconds: float) -> Report:
        """Drive the engine until a unit is finished or `seconds` have passed."""
        runner = self._runner
        if runner is None:
            return Report(fatal=self._fatal)
        try:
            outcomes = runner.work(seconds)
            return Report(tuple(outcomes), tuple(runner.progress()))
        except Exception as error:  # the worker's boundary, as above
            return self._die(error)

    def close(self) -> None:
        """Let go of the runner."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _die(self, error: Exception, refused: bool = False) -> Report:
        if not refused:  # to the actor's own log: the report is one line, which says it all where it is one of ours
            traceback.print_exception(error, file=sys.stderr)
        self.close()
        text = " ".join(str(error).split())
        self._fatal = text if isinstance(error, TwoTowerError) else f"{type(error).__name__}: {text}"
        return Report(fatal=self._fatal, refused=refused)
