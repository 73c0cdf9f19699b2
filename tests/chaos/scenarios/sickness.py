"""Makes forwards fail for reasons outside the rows: no row may be blamed, and one sick machine may not stop a job."""

import json

from pipeline.driver.slots import BARREN_LIVES
from tests.chaos.logs import read_lives
from tests.chaos.sabotage import SICK
from tests.chaos.scenarios.record import Record
from tests.chaos.scenarios.trial import Trial

SICK_RUNS = 3
"""The number of times that a job is submitted to a sick environment."""
MOST_LIVES = 12
"""The most lives that a sick slot may have in the few seconds of its scenario."""


def sick_environment(trial: Trial, how: str) -> Record:
    """Fault: every forward fails with the error `how`, in three submissions one after the other; then it is repaired.

    Promise: each of them ends with exit code 1, and the next one completes the job without an error row too many.
    """
    trial.flags.set(SICK, slot="", how=how)
    for _ in range(SICK_RUNS):
        _end_sick(trial, trial.run().poll())
    trial.flags.clear(SICK)
    return trial.finish()


def sick_midway(trial: Trial, how: str) -> Record:
    """Fault: after some rows have ended well, every forward fails, in this run and in the next one.

    Promise: as in sick_environment. Rows that ended before are no proof that the environment is still healthy.
    """
    driver = trial.submit_until(trial.under_way)
    trial.flags.set(SICK, slot="", how=how)
    _end_sick(trial, driver.wait())
    _end_sick(trial, trial.run().poll())
    trial.flags.clear(SICK)
    return trial.finish()


def _end_sick(trial: Trial, code: int | None) -> None:
    trial.promise(code == 1, f"the exit code in a sick environment is {code}, not 1")


def sick_slot(trial: Trial, how: str) -> Record:
    """Fault: every life of slot r1 dies at its first forward; r0 is healthy.

    Promise: the job completes on r0 without an error row too many, r1 does not get one life after the other, and the
    manifest says that it was left out.
    """
    if not trial.place.long:  # rows are blamed sooner then
        trial.job["retry"]["attempts"] = 1
    trial.flags.set(SICK, slot="r1", how=how)
    code = trial.run().poll()
    trial.promise(code == 0, f"the job does not complete on the healthy slot: {trial.runs[-1].tail()}")
    lives = sum(life.slot == "r1" for life in read_lives(trial.logs))
    trial.promise(1 <= lives <= MOST_LIVES, f"the sick slot had {lives} lives")
    if lives > BARREN_LIVES:
        warnings = json.loads((trial.output / "_job" / "manifest.json").read_text())["warnings"]
        trial.promise(any("r1" in text and "left out" in text for text in warnings), f"the manifest says {warnings}")
    trial.flags.clear(SICK)
    return trial.finish()
