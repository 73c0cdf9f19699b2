"""Stops drivers and replicas with SIGSTOP and continues them, sometimes after others have taken over their work."""

import os
import signal
import time
from contextlib import suppress

from tests.chaos.sabotage import STOP_BEFORE
from tests.chaos.scenarios.record import Record
from tests.chaos.scenarios.trial import Driver, Trial

STOP_S, LONG_STOP_S = 1.0, 15.0
"""The seconds for which a process is stopped, in short and in long scenarios."""
STALL_MINUTES = 0.1
"""The minutes without progress after which a stopped replica is replaced."""
STEPS_BYTES = 300
"""The bytes by which a log grows with some ten steps of an engine."""


def stopped_driver(trial: Trial) -> Record:
    """Fault: the driver is stopped in the middle of its run and continued. Promise: it completes the job."""
    driver = trial.submit_until(trial.under_way)
    driver.send(signal.SIGSTOP)
    time.sleep(LONG_STOP_S if trial.place.long else STOP_S)
    driver.send(signal.SIGCONT)
    trial.promise(driver.wait() == 0, f"the driver did not survive: {driver.tail()}")
    return trial.finish()


def replaced_driver(trial: Trial) -> Record:
    """Fault: a driver is stopped in the middle of its run, another one completes the job, and the first is continued.

    Promise: the first ends with exit code 1 and changes nothing.
    """
    zombie = trial.submit_until(trial.under_way)
    zombie.send(signal.SIGSTOP)
    trial.promise(trial.run().poll() == 0, f"the second driver did not complete the job: {trial.runs[-1].tail()}")
    zombie.send(signal.SIGCONT)
    code = zombie.wait()
    trial.promise(code == 1, f"the exit code of a driver that was replaced is {code}, not 1: {zombie.tail()}")
    return trial.finish()


def zombie_at_completion(trial: Trial, before: str) -> Record:
    """Fault: a driver is stopped just before it writes the file `before` (its manifest, or `_SUCCESS`). Meanwhile input
    files are added, and a second driver takes over and is killed in the middle. Then the first is continued.

    Promise: there is no `_SUCCESS` over the incomplete output, and submitting again completes the job.
    """
    trial.flags.set(STOP_BEFORE, name=before)
    zombie = trial.submit()
    trial.wait_for(zombie, zombie.stopped)
    parts = len(trial.parts())
    trial.extend(rows=400, files=2)
    trial.submit_until(lambda: len(trial.parts()) > parts + 1).kill()
    zombie.send(signal.SIGCONT)
    code = zombie.wait()
    trial.promise(code == 1, f"the exit code of a driver that was replaced is {code}, not 1: {zombie.tail()}")
    trial.promise(not (trial.output / "_SUCCESS").exists(), "there is _SUCCESS over an incomplete output")
    return trial.finish()


def stopped_replica(trial: Trial) -> Record:
    """Fault: the process of a replica is stopped while it works, and continued soon. Promise: the job completes."""
    driver, pid = _stop_r0(trial)
    size = trial.log_bytes("r1")
    trial.wait_for(driver, lambda: trial.log_bytes("r1") > size + STEPS_BYTES)
    if trial.place.long:
        time.sleep(LONG_STOP_S)
    _continue(pid)
    trial.promise(driver.wait() == 0, f"the job did not survive: {driver.tail()}")
    return trial.finish()


def dropped_replica(trial: Trial) -> Record:
    """Fault: the process of a replica is stopped until the driver has given it up, and is then continued.

    Promise: the job completes, whatever the old process still writes.
    """
    trial.job["retry"]["stall_minutes"] = STALL_MINUTES
    driver, pid = _stop_r0(trial)
    trial.wait_for(driver, lambda: "retry.stall_minutes" in driver.said())  # the reason that the driver gives
    _continue(pid)
    trial.promise(driver.wait() == 0, f"the job did not survive: {driver.tail()}")
    return trial.finish()


def _stop_r0(trial: Trial) -> tuple[Driver, int]:
    """Start a run, stop replica r0 once it and r1 generate rows, and return the driver and the process id of r0."""
    working = lambda: min(trial.log_bytes("r0"), trial.log_bytes("r1")) > STEPS_BYTES  # noqa: E731
    driver = trial.submit_until(working)
    [life] = trial.lives("r0")
    os.kill(life.pid, signal.SIGSTOP)
    return driver, life.pid


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):  # the pool has killed it
        os.kill(pid, signal.SIGCONT)
