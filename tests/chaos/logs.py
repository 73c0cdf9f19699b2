"""Reads the replicas' logs: which replica lived when and on which node, and when which rows ended on it."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLOCKS_S = 30.0
"""The seconds by which the machine's clock may be changed while a process runs."""


@dataclass(slots=True)
class Life:
    """One process of a replica, as its log tells. Times are seconds since the epoch."""

    run: int
    """The number of the run of the job, from 1."""
    slot: str
    """The place of the replica: r0 of the name r0.3. A replica that dies is replaced in the same place."""
    number: int
    """The number of the replica in its place: 3 of the name r0.3, 1 of the name r0."""
    pid: int
    node: str = ""
    """The id of the Ray node; "" if the process ended before it wrote it."""
    started: float = 0.0
    forwards: int = 0
    """The denoiser forwards, each counted once for every row that took part in it."""
    ends: list[float] = field(default_factory=list)
    """The times at which a step ended that finished rows."""
    keys: list[str] = field(default_factory=list)
    """The keys of the finished rows, in the order in which they ended."""
    crashed: bool = False
    """True if a prompt ended the process."""

    @classmethod
    def read(cls, path: Path) -> "Life":
        """Read a log of tests.chaos.engine.Log; an incomplete last line is left out."""
        run, name, pid = path.name.split("_")
        slot, _, number = name.partition(".")
        head, *lines = path.read_text().split("\n")[:-1] or [""]
        started, _, node = head.partition(" ")
        life = cls(int(run), slot, int(number or 1), int(pid), node, float(started or 0))
        for line in lines:
            if line == "crash":
                life.crashed = True
                break
            time, forwards, *keys = line.split()
            life.forwards += int(forwards)
            if keys:
                life.ends.append(float(time))
                life.keys += keys
        return life

    def alive(self) -> bool:
        """Return whether the process still runs.

        A process id is used again after the end of its process, perhaps by another test that uses Ray. So the process
        of this id must be Ray's and must have started before the log says.
        """
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
            age = age_of(self.pid)
        except OSError:
            return False
        return command.startswith(b"ray::") and time.time() - age < self.started + CLOCKS_S


def age_of(pid: int) -> float:
    """Return the seconds since the process began. Raises OSError if it is gone."""
    began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


def read_lives(folder: Path) -> list[Life]:
    """Return the lives of all logs in the folder, the one that started first coming first."""
    return sorted((Life.read(path) for path in folder.iterdir()), key=lambda life: life.started)


def heads(folder: Path, run: int) -> Iterator[Life]:
    """Yield the lives of one run without their rows. This is cheap, as only the first line of each log is read.

    A log whose first line is not complete is left out.
    """
    for path in folder.glob(f"{run}_*"):
        with path.open() as file:
            started, _, node = file.readline().strip().partition(" ")
        _, name, pid = path.name.split("_")
        slot, _, number = name.partition(".")
        if node:
            yield Life(run, slot, int(number or 1), int(pid), node, float(started))


def log_bytes(folder: Path) -> int:
    """Return the size of all logs together in bytes. It grows with every step of an engine."""
    return sum(os.stat(path).st_size for path in folder.iterdir())


def finished_since(lives: Sequence[Life], run: int, time: float) -> float | None:
    """Return the first time after `time` at which a row ended in this run; None if there is none."""
    ends = [end for life in lives if life.run == run for end in life.ends if end > time]
    return min(ends, default=None)


def replaced(lives: Sequence[Life], lost: Life) -> float | None:
    """Return when a row first ended on a later replica in the place of the lost one, in the same run, or None."""
    later = [x for x in lives if (x.run, x.slot) == (lost.run, lost.slot) and x.number > lost.number and x.ends]
    return min((life.ends[0] for life in later), default=None)


def times_finished(lives: Sequence[Life]) -> Counter[str]:
    """Return how often an engine finished each row, by row key."""
    return Counter(key for life in lives for key in life.keys)
