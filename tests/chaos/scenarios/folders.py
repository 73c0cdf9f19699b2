"""Takes the output folder away, fills its disk, or gives it a file system without hard links."""

import shutil
import signal
import time
from pathlib import Path

from tests.chaos.sabotage import DISK_FULL, KILL_AT_FILL, NO_LINKS, STOP_AT_FILL
from tests.chaos.scenarios.record import Record
from tests.chaos.scenarios.trial import Trial

FULL_S, LONG_FULL_S = 2.0, 30.0
"""The seconds for which a disk stays full, in short and in long scenarios."""
FILLS = 14
"""The number of files that a killed run may fill before it dies: its claim, the plan, segments and parts."""
KILLS, LONG_KILLS = 4, 12
"""The number of runs that are killed at a fill, in short and in long scenarios."""
GONE = "the output folder was removed or moved"


def disk_full(trial: Trial) -> Record:
    """Fault: the disk of the output is full for a while during the run. Promise: the run waits and completes."""
    driver = trial.submit_until(trial.under_way)
    trial.flags.set(DISK_FULL)
    time.sleep(LONG_FULL_S if trial.place.long else FULL_S)
    trial.flags.clear(DISK_FULL)
    trial.promise(driver.wait() == 0, f"the run did not wait for the disk: {driver.tail()}")
    return trial.finish()


def disk_full_at_start(trial: Trial) -> Record:
    """Fault: the disk is full, the run dies, and the job is submitted again while the disk is still full.

    Promise: that run ends with exit code 1, and once there is room, submitting again completes the job.
    """
    driver = trial.submit_until(trial.under_way)
    trial.flags.set(DISK_FULL)
    driver.kill()
    code = trial.run().poll()
    trial.promise(code == 1, f"the exit code on a full disk is {code}, not 1")
    trial.flags.clear(DISK_FULL)
    return trial.finish()


def lost_folder(trial: Trial, how: str) -> Record:
    """Fault: during the run the output folder is `removed`, `renamed`, or `emptied` like a mount point whose disk is
    unmounted.

    Promise: the run ends with exit code 1, says why, and does not make the folder anew. Submitting again completes the
    job, with the rows that it had if the folder is back.
    """
    driver = trial.submit_until(trial.under_way)
    aside = trial.place.folder / "aside"
    driver.send(signal.SIGSTOP)  # a disk is unmounted at one moment, and here it takes some
    trial.wait_for(driver, driver.stopped)
    if how == "emptied":
        _move_content(trial.output, aside)
    else:
        trial.output.rename(aside)
    if how == "removed":
        shutil.rmtree(aside)
    driver.send(signal.SIGCONT)
    code = driver.wait()
    trial.promise(code == 1, f"the exit code of a run without its folder is {code}, not 1")
    trial.promise(GONE in driver.said(), f"the run does not say that its folder is gone: {driver.tail()}")
    if how != "emptied":  # a mount point is still there, and the run may write to it until it looks
        trial.promise(not trial.output.exists(), "the run made its folder anew")
    if how != "removed":
        shutil.rmtree(trial.output, ignore_errors=True)
        aside.rename(trial.output)
    return trial.finish()


def no_hard_links(trial: Trial) -> Record:
    """Fault: the file system has no hard links, and runs are killed between claiming a name and filling the file.

    Promise: submitting again completes the job.
    """
    trial.flags.set(NO_LINKS)
    for number in range(LONG_KILLS if trial.place.long else KILLS):
        trial.flags.set(KILL_AT_FILL, skip=number if number < 2 else trial.rng.randrange(FILLS))
        code = trial.run().poll()
        trial.promise(code in (0, -signal.SIGKILL), f"a run fails after a kill at a fill: {trial.runs[-1].tail()}")
    trial.flags.clear(KILL_AT_FILL)
    return trial.finish()


def two_fill(trial: Trial) -> Record:
    """Fault: the file system has no hard links, and a run is stopped between claiming the name of a part and filling
    it. A second run completes the job, and the first is continued.

    Promise: whoever fills the part last, the output is complete and sound.
    """
    trial.flags.set(NO_LINKS)
    trial.flags.set(STOP_AT_FILL, name="part-")
    zombie = trial.submit()
    trial.wait_for(zombie, zombie.stopped)
    trial.promise(trial.run().poll() == 0, f"the second run did not complete the job: {trial.runs[-1].tail()}")
    zombie.send(signal.SIGCONT)
    code = zombie.wait()
    trial.promise(code == 1, f"the exit code of a driver that was replaced is {code}, not 1: {zombie.tail()}")
    return trial.finish()


def _move_content(source: Path, target: Path) -> None:
    """Move everything in a folder to a new one."""
    target.mkdir()
    for path in [*source.iterdir()]:
        path.rename(target / path.name)
