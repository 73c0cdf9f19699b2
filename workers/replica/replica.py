"""A replica: one loaded model and its unit runner, in a process of its own (an actor of workers.cluster.pool) or in
this one (workers.replica.local_pool). It knows no Ray. Whatever is raised inside ends here, as a report.
"""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from model.errors import TwoTowerError
from model.runtime.device_errors import device_lost, first_line
from pipeline.core.error_kinds import without_quotations
from pipeline.core.events import Event, ReplicaActive, ReplicaNote
from pipeline.core.types import Assignment
from pipeline.monitoring.logs import event_record, is_json, log, work_record
from workers.units.runner import UnitRunner

FLUSH_S = 15.0
"""Seconds that a replica which is stopped has for writing down the rows that it finished."""
LEAVE_S = 5.0
"""Seconds in which the driver hears why a replica is dead, before its process leaves."""
DEAD_EXIT, STOPPED_EXIT = 1, 128 + signal.SIGTERM
"""Exit codes of a replica's process that leaves by itself: its engine is dead; it was told to."""
SOURCE = "replica"
"""Tells its log records from the driver's."""

MakeRunner = Callable[[str], UnitRunner]
"""Loads the model and makes the runner of the replica with this name; picklable, as it travels to the actor."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a call of a replica tells the driver: counts, never rows."""

    events: tuple[Event, ...] = ()
    fatal: str | None = None
    """Why the replica can do no more: it is to be thrown away, with all that it holds."""
    refused: bool = False
    """It did not start, with one of the project's own errors."""
    excused: bool = False
    """It was told to leave, and did: nothing is wrong with what it holds."""
    device_lost: bool = False
    """Its process can no longer use the GPU: another replica needs another process."""


class Replica:
    """Calls of `start` and `work` come one at a time; all others may come at any moment, so that a freed replica does
    not wait for its next unit until a running `work` returns."""

    def __init__(self, name: str, make_runner: MakeRunner) -> None:
        self._name, self._make_runner = name, make_runner
        self._runner: UnitRunner | None = None
        self._fatal = f"replica {name} was not started"
        self._device_lost = False
        self._kept: tuple[object, ...] = ()

    def start(self) -> Report:
        """Load the model. Not part of the constructor, because Ray gives a failed constructor's error as text only."""
        try:
            self._runner = self._make_runner(self._name)
        except Exception as error:  # the worker's boundary: the reason goes to the driver, the process is thrown away
            return self._die(error, refused=isinstance(error, TwoTowerError))
        for text in self._runner.notes():  # its memory plan: that of every replica would be too much for the operator
            self._say(text)
        log((logging.INFO, "replica started", {}), source=SOURCE, replica=self._name)
        return Report()

    def assign(self, work: Assignment) -> None:
        """Take work; a dead replica takes none, its next report says so."""
        if self._runner is not None:
            try:
                self._runner.add(work)
                log(work_record("unit begun", self._name, work), source=SOURCE)
            except Exception as error:  # the worker's boundary: nobody waits for this call's result
                self._die(error)

    def work(self, seconds: float) -> Report:
        """Drive the engine until a unit is finished or `seconds` have passed."""
        runner = self._runner
        if runner is None:
            return Report(fatal=self._fatal, device_lost=self._device_lost)
        try:
            outcomes = runner.work(seconds)
            for outcome in outcomes:
                log(event_record(outcome), source=SOURCE)
            return Report((*runner.progress(), *outcomes, *self.look(), *self._notes(runner)))
        except Exception as error:  # the worker's boundary, as above
            return self._die(error)

    def look(self) -> tuple[ReplicaActive, ...]:
        """What it is doing; answers at once, also while a step of the engine hangs."""
        runner = self._runner
        return () if runner is None else (ReplicaActive(self._name, runner.beats, runner.doing(), runner.stats()),)

    def stop(self, seconds: float) -> int:
        """Write down all finished rows, within `seconds`, and do no more; returns how many those were."""
        if self._runner is None:
            return 0
        try:
            return self._runner.stop(seconds)
        except Exception as error:  # the worker's boundary: it is about to go in any case
            traceback.print_exception(error, file=sys.stderr)
            return 0

    def close(self) -> None:
        """Let go of the runner."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _say(self, text: str) -> None:
        """To this process's own log."""
        if is_json():
            log((logging.INFO, "note", {"text": text}), source=SOURCE, replica=self._name)
        else:
            print(f"{self._name}: {text}", flush=True)

    def _notes(self, runner: UnitRunner) -> tuple[ReplicaNote, ...]:
        return tuple(ReplicaNote(self._name, text) for text in runner.notes())

    def _die(self, error: Exception, refused: bool = False) -> Report:
        self._device_lost = device_lost(error)
        text = first_line(error) if self._device_lost else " ".join(str(error).split())
        self._fatal = text if isinstance(error, TwoTowerError) else f"{type(error).__name__}: {text}"
        log(
            (logging.ERROR, "replica died", {"reason": without_quotations(self._fatal)}),
            source=SOURCE,
            replica=self._name,
        )
        # To the actor's own log: the report is one line, which says it all where it is one of ours.
        if self._device_lost:
            self._fatal = f"a GPU failed, and this process cannot use it any more: {self._fatal}"
            print(f"{self._name}: {self._fatal}; the process ends", file=sys.stderr, flush=True)
            self._kept = (self._runner, error)  # to free their tensors could call the device
        elif not refused:
            traceback.print_exception(error, file=sys.stderr)
        self.stop(FLUSH_S)  # finished rows are on the host
        self.close()
        return Report(fatal=self._fatal, refused=refused and not self._device_lost, device_lost=self._device_lost)


class ReplicaProcess(Replica):
    """A replica with a process to itself, which ends with it.

    SIGTERM (a spot notice, a node that is drained) writes down the finished rows; the driver is told, and the process
    leaves with STOPPED_EXIT. A dead engine or GPU takes it down with DEAD_EXIT, whether the driver is there
    to kill it or not.
    """

    def __init__(self, name: str, make_runner: MakeRunner) -> None:
        """To be called on the main thread: Ray makes its actors there, and runs their methods on others."""
        super().__init__(name, make_runner)
        self._told_to_leave = threading.Event()
        self._flushed = threading.Event()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def work(self, seconds: float) -> Report:
        """See Replica."""
        report = super().work(seconds)
        if not self._told_to_leave.is_set() or report.fatal is not None:
            return report
        self._flushed.wait(FLUSH_S)
        return Report(report.events, "it was told to leave (SIGTERM)", excused=True)

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        if not self._told_to_leave.is_set():
            self._told_to_leave.set()
            threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        if self._runner is None:  # it loads: nothing is finished, and nobody hears
            os._exit(STOPPED_EXIT)
        _leave_later(STOPPED_EXIT, FLUSH_S + LEAVE_S)  # storage may hang
        self.stop(FLUSH_S)
        self._flushed.set()
        _leave_later(STOPPED_EXIT, LEAVE_S)

    def _die(self, error: Exception, refused: bool = False) -> Report:
        report = super()._die(error, refused)
        _leave_later(DEAD_EXIT, LEAVE_S)
        return report


def _leave_later(code: int, seconds: float) -> None:
    # os._exit: threads of a broken engine or of a storage that hangs would keep a tidy exit waiting.
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
