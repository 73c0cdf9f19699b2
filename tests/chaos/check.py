"""Compares a job's output with the run without faults, and adds up what the faults cost."""

import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from pipeline.storage.storage import Storage
from tests.chaos.harness import ROOT, History
from tests.chaos.logs import finished_since, read_lives, replaced, times_finished
from tests.chaos.rows import COLUMNS

Rows = Mapping[str, tuple[object, ...]]


@dataclass(slots=True)
class Verdict:
    """The findings for one seed, or the sum over several seeds."""

    rows: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    repeated: int = 0
    """Number of times that an engine finished a row that had been finished before."""
    forwards: int = 0
    """Denoiser forwards that were computed, counted per row, including those of rows lost with their process."""
    needed: int = 0
    """Denoiser forwards that the run without faults computes, counted per row."""
    recover_s: dict[str, list[float]] = field(default_factory=lambda: {"actor": [], "node": [], "driver": []})
    runs: int = 0
    exits: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    """The output of `verify` if it found something wrong."""
    seconds: float = 0.0

    def __add__(self, other: "Verdict") -> "Verdict":
        recover_s = {kind: self.recover_s[kind] + other.recover_s[kind] for kind in self.recover_s}
        values = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__ if name != "recover_s"}
        return Verdict(recover_s=recover_s, **values)

    @property
    def right(self) -> bool:
        """Whether every row is in the output exactly once, as without faults."""
        return not (self.lost or self.duplicated or self.changed or self.findings)

    @property
    def repeated_share(self) -> float:
        return self.repeated / self.rows

    def medians(self) -> dict[str, float | None]:
        """Return the medians of recover_s, with None for a kind of which nothing was measured."""
        return {kind: round(statistics.median(x), 2) if x else None for kind, x in self.recover_s.items()}


def judge(history: History, expected: Rows) -> Verdict:
    """Read everything that the job left, and return the verdict."""
    found = Counter[str]()
    changed = []
    for key, row in read_output(Storage(history.output)):
        found[key] += 1
        if row != expected.get(key):
            changed.append(f"{key}: {row} instead of {expected.get(key)}")
    whole, said = verify(history.output)
    lives = read_lives(history.logs)
    times = times_finished(lives)
    verdict = Verdict(
        rows=len(expected),
        faults=Counter(killed.kind for killed in history.killed) + history.injected,
        lost=sorted(expected.keys() - found.keys()),
        duplicated=sorted(key for key, count in found.items() if count > 1),
        changed=sorted(changed),
        repeated=sum(times.values()) - len(times),
        forwards=sum(life.forwards for life in lives),
        needed=sum(int(str(row[3])) for row in expected.values()),
        runs=history.runs,
        exits=history.exits,
        findings=[] if whole else [said],
        seconds=history.seconds,
    )
    verdict.faults["crash"] = sum(life.crashed for life in lives)
    for killed in history.killed:
        if killed.kind == "driver":
            found_ends = [finished_since(lives, killed.run + 1, killed.time)]
        else:
            found_ends = [replaced(lives, life) for life in killed.lives]
        ends = [end for end in found_ends if end is not None]  # None: no work was left for it, or the driver died too
        if killed.kind in verdict.recover_s and ends:
            verdict.recover_s[killed.kind].append(max(ends) - killed.time)
    return verdict


def read_output(storage: Storage) -> Iterable[tuple[str, tuple[object, ...]]]:
    """Yield the key and COLUMNS of every row in the parts."""
    for part in storage.list_files("", "part-*.parquet"):
        table = pq.read_table(storage.open(part.name, part.size), columns=["source_file", "source_row", *COLUMNS])
        for file, number, *row in zip(*(column.to_pylist() for column in table.columns), strict=True):
            yield f"{file}#{number}", tuple(row)


def verify(output: str) -> tuple[bool, str]:
    """Return whether `python -m pipeline verify` finds nothing wrong, and its output."""
    command = [sys.executable, "-m", "pipeline", "verify", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode == 0, (done.stdout + done.stderr).strip()
