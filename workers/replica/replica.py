"""Implements a replica: one loaded model with its unit runner.

A replica runs in a process of its own (an actor of workers.cluster.pool) or in the driver's process
(workers.replica.local_pool). This module does not use Ray. An error that ends a replica is caught here, and the Report
of that call or of the next one tells the pool that the replica is lost. An error while a replica stops is only printed.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from model.errors import TwoTowerError
from model.runtime.device_errors import device_lost, first_line
from pipeline.core.error_kinds import without_quotations
from pipeline.core.events import Event, ReplicaActive, ReplicaNote, UnitProgress
from pipeline.core.limits import limit_advice
from pipeline.core.streams import say, say_traceback
from pipeline.core.text import one_line
from pipeline.core.types import Assignment, WorkKey
from pipeline.monitoring.logs import event_record, is_json, log, work_record
from workers.units.runner import UnitRunner

FLUSH_S = 15.0
"""Seconds that a replica has for saving its finished rows when it is stopped."""
LEAVE_S = 5.0
"""Seconds between a replica's last report and the end of its process, so that the driver can still receive it."""
DEAD_EXIT, STOPPED_EXIT = 1, 128 + signal.SIGTERM
"""Exit codes of a replica's process that ends by itself: DEAD_EXIT after an error, STOPPED_EXIT after SIGTERM."""
SOURCE = "replica"
"""The source named in a replica's log records, which distinguishes them from the driver's."""

MakeRunner = Callable[[str], UnitRunner]
"""A function that loads the model and returns the runner for the replica with the given name. It must be picklable,
because it is sent to the actor."""


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of a replica to a call of its pool. It carries counts and short texts, never rows."""

    events: tuple[Event, ...] = ()
    """Events for the driver, in order."""
    fatal: str | None = None
    """The reason why the replica cannot continue and must be replaced; None if it can continue."""
    refused: bool = False
    """Whether the replica failed to start with one of the project's own errors, which a new replica would raise too."""
    excused: bool = False
    """Whether the replica stopped because it was asked to, so that its rows are not suspected of killing it."""
    device_lost: bool = False
    """Whether the process can no longer use its GPU, so that a new replica needs a new process."""
    max_rows: int = 0
    """The row limit of the engine, in the report of a start (ReplicaReady.max_rows)."""
    node: str = ""
    """The name of the machine, in the report of a start."""


class Replica:
    """A loaded model with its unit runner, behind methods that report errors instead of raising them.

    `start` and `work` are called one at a time. All other methods may be called while they run, so that a replica gets
    its next unit before a running `work` returns.
    """

    def __init__(self, name: str, make_runner: MakeRunner) -> None:
        self._name, self._make_runner = name, make_runner
        self._runner: UnitRunner | None = None
        self._fatal = f"replica {name} was not started"
        self._device_lost = False
        self._told: dict[WorkKey, UnitProgress] = {}  # the progress in the last report
        self._kept: tuple[object, ...] = ()

    def start(self) -> Report:
        """Load the model and make the runner. The report is fatal if that fails.

        The constructor does not do this, because Ray reports a constructor's error as text only.
        """
        try:
            self._runner = self._make_runner(self._name)
        except Exception as error:  # catches everything: the driver gets the reason and replaces the replica
            return self._die(error, refused=isinstance(error, TwoTowerError))
        for text in self._runner.notes():  # such as the memory plan; the operator should not get one from every replica
            self._say(text)
        log((logging.INFO, "replica started", {}), source=SOURCE, replica=self._name)
        return Report(max_rows=self._runner.max_rows, node=socket.gethostname())

    def assign(self, work: Assignment) -> None:
        """Accept work, which a running or later `work` call does. A dead replica ignores it; its next report says that
        it is dead."""
        if self._runner is not None:
            try:
                self._runner.add(work)
                log(work_record("unit begun", self._name, work), source=SOURCE)
            except Exception as error:  # catches everything: nobody waits for this call's result
                self._die(error)

    def work(self, seconds: float) -> Report:
        """Drive the engine until a unit is finished or `seconds` have passed. Report the progress, finished units and
        notes, or the error that ended the replica."""
        runner = self._runner
        if runner is None:
            return Report(fatal=self._fatal, device_lost=self._device_lost)
        try:
            outcomes = runner.work(seconds)
            for outcome in outcomes:
                log(event_record(outcome), source=SOURCE)
            return Report((*self._progress(runner), *outcomes, *self.look(), *self._notes(runner)))
        except Exception as error:  # catches everything, as above
            return self._die(error)

    def look(self) -> tuple[ReplicaActive, ...]:
        """Return what the replica is doing; () if it is dead or not started. Answers at once, even while an engine step
        hangs."""
        runner = self._runner
        return () if runner is None else (ReplicaActive(self._name, runner.beats, runner.doing(), runner.stats()),)

    def stop(self, seconds: float) -> int:
        """End the work for good, save all finished rows within `seconds`, and return how many rows this call saved. An
        error is only printed."""
        if self._runner is None:
            return 0
        try:
            return self._runner.stop(seconds)
        except Exception as error:  # catches everything: the replica is about to end in any case
            say_traceback(error)
            return 0

    def close(self) -> None:
        """Close and forget the runner, if there is one."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _say(self, text: str) -> None:
        """Write a message to this process's own log."""
        if is_json():
            log((logging.INFO, "note", {"text": text}), source=SOURCE, replica=self._name)
        else:
            say(f"{self._name}: {text}")

    def _progress(self, runner: UnitRunner) -> list[UnitProgress]:
        """Return the progress of the assignments that differs from the last report. With many small units, most of them
        only wait."""
        told, self._told = self._told, {report.key: report for report in runner.progress()}
        return [report for key, report in self._told.items() if report != told.get(key)]

    def _notes(self, runner: UnitRunner) -> tuple[ReplicaNote, ...]:
        return tuple(ReplicaNote(self._name, text) for text in runner.notes())

    def _die(self, error: Exception, refused: bool = False) -> Report:
        """Log the error, save the finished rows, close the runner, and return the report of the replica's end.

        `refused`: see Report.
        """
        self._device_lost = device_lost(error)
        text = first_line(error) if self._device_lost else one_line(error)
        self._fatal = text if isinstance(error, TwoTowerError) else f"{type(error).__name__}: {text}"
        self._fatal += limit_advice(self._fatal)
        log(
            (logging.ERROR, "replica died", {"reason": without_quotations(self._fatal)}),
            source=SOURCE,
            replica=self._name,
        )
        # The report is one line, which is enough for a refused start. Any other error is also written to stderr.
        if self._device_lost:
            self._fatal = f"a GPU failed, and this process cannot use it any more: {self._fatal}"
            say(f"{self._name}: {self._fatal}; the process ends", sys.stderr)
            self._kept = (self._runner, error)  # kept alive, because freeing their tensors could call the device
        elif not refused:
            say_traceback(error)
        self.stop(FLUSH_S)  # finished rows are in host memory, so they can still be saved
        self.close()
        return Report(fatal=self._fatal, refused=refused and not self._device_lost, device_lost=self._device_lost)


class ReplicaProcess(Replica):
    """A replica that has a process of its own, which ends with the replica.

    On SIGTERM (a spot notice, or a node that is drained) the replica saves its finished rows and reports to the driver;
    the process exits with STOPPED_EXIT. After an error of the engine or the GPU the process exits with DEAD_EXIT, even
    if there is no driver left to kill it.
    """

    def __init__(self, name: str, make_runner: MakeRunner) -> None:
        """Create a replica and install its SIGTERM handler.

        Must be called on the main thread. Ray creates its actors there, and runs their methods on other threads.
        """
        super().__init__(name, make_runner)
        self._told_to_leave = threading.Event()
        self._flushed = threading.Event()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def work(self, seconds: float) -> Report:
        """See Replica. After SIGTERM, wait until the finished rows are saved, and report the end of the replica."""
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
        """Save the finished rows and end the process soon after. Runs in a thread of its own after SIGTERM."""
        if self._runner is None:  # no model is loaded: there is nothing to save, and no running `work` could report
            os._exit(STOPPED_EXIT)
        _leave_later(STOPPED_EXIT, FLUSH_S + LEAVE_S)  # ends the process even if the storage hangs
        self.stop(FLUSH_S)
        self._flushed.set()
        _leave_later(STOPPED_EXIT, LEAVE_S)

    def _die(self, error: Exception, refused: bool = False) -> Report:
        report = super()._die(error, refused)
        _leave_later(DEAD_EXIT, LEAVE_S)
        return report


def _leave_later(code: int, seconds: float) -> None:
    """End the process with this exit code after `seconds`, whatever it is doing."""
    # os._exit, because a normal exit would wait for threads of a broken engine or of a storage that hangs.
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
