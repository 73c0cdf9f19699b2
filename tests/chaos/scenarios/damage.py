"""Damages files of the output between two runs, as a broken disk, a bad copy or an operator does."""

from pathlib import Path
from random import Random

from pipeline.maintenance.verify import verify
from tests.chaos.scenarios.record import Record
from tests.chaos.scenarios.trial import Trial

KINDS = ("truncated", "zeroed", "flipped", "emptied", "removed")
"""The kinds of damage: the end is gone, all bytes are 0, one bit is wrong, no byte is left, the file is gone."""


def damaged_plan(trial: Trial, kind: str) -> Record:
    """Fault: plan.json is damaged after a run that was killed. Promise: submitting again completes the job, and the
    parts that were there stay as they are."""
    _kill_midway(trial)
    return _finish_without_plan(trial, kind)


def damaged_plan_extended(trial: Trial, kind: str) -> Record:
    """Fault: plan.json is damaged after the input was extended and that run was killed too. Promise: as in
    damaged_plan."""
    _kill_midway(trial)
    parts = len(trial.parts())
    trial.extend(rows=200, files=2)
    trial.submit_until(lambda: len(trial.parts()) > parts + 1 and trial.segments()).kill()
    return _finish_without_plan(trial, kind)


def damaged_segment(trial: Trial, kind: str) -> Record:
    """Fault: a segment is damaged after a run that was killed. Promise: its rows are generated again."""
    _kill_midway(trial)
    spoil(trial.rng.choice(trial.segments()), kind, trial.rng)
    return trial.finish()


def damaged_part(trial: Trial, kind: str, complete: bool) -> Record:
    """Fault: a part is damaged after a run that was killed, or if `complete` in a complete output.

    Promise: the job or `verify` names the part. Once it is moved away, submitting again completes the job.
    """
    if complete:
        trial.promise(trial.run().poll() == 0, f"the job failed before its fault: {trial.runs[-1].tail()}")
    else:
        _kill_midway(trial)
    part = trial.rng.choice(trial.parts())
    spoil(part, kind, trial.rng)
    driver = trial.run()
    if driver.poll() != 0:
        trial.promise(part.name in driver.said(), f"{part.name} is not named: {driver.tail()}")
        _move_away(trial, part)
    elif problems := verify(str(trial.output)).problems:
        trial.promise(part.name in " ".join(problems), f"{part.name} is not named: {problems}")
        _move_away(trial, part)
    return trial.finish()


def spoil(path: Path, kind: str, rng: Random) -> None:
    """Damage a file in the way of `kind`, one of KINDS."""
    if kind == "removed":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: rng.randrange(1, len(data))]
    elif kind == "zeroed":
        data = bytearray(len(data))
    elif kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data.clear()
    path.write_bytes(data)


def _kill_midway(trial: Trial) -> None:
    trial.submit_until(trial.under_way).kill()


def _finish_without_plan(trial: Trial, kind: str) -> Record:
    before = {part: part.read_bytes() for part in trial.parts()}
    spoil(trial.output / "_job/plan.json", kind, trial.rng)
    record = trial.finish()
    touched = [part.name for part, data in before.items() if not part.exists() or part.read_bytes() != data]
    trial.promise(not touched, f"parts were generated again: {touched}")
    record.survived &= not record.said
    return record


def _move_away(trial: Trial, part: Path) -> None:
    part.rename(trial.place.folder / part.name)
