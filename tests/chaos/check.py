"""Compares the output of a job that suffered faults with the expected rows, and measures what the faults cost."""

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

FINISH_REASON = COLUMNS.index("finish_reason")
Rows = Mapping[str, tuple[object, ...]]
"""Row key -> the values of COLUMNS."""


@dataclass(slots=True)
class Verdict:
    """The findings about the output of one seed's job, or the sums over several seeds."""

    rows: int = 0
    """The number of rows that the output must have."""
    faults: Counter[str] = field(default_factory=Counter)
    """The number of faults by kind."""
    lost: list[str] = field(default_factory=list)
    """The keys of rows that are in no part."""
    duplicated: list[str] = field(default_factory=list)
    """The keys of rows that are in the parts more than once."""
    changed: list[str] = field(default_factory=list)
    """One text for each row that is in a part but not as expected, condemned rows excluded."""
    condemned: list[str] = field(default_factory=list)
    """The keys of healthy rows that became error rows."""
    repeated: int = 0
    """The number of times that an engine finished a row that had been finished before."""
    forwards: int = 0
    """Denoiser forwards that were computed, counted per row, including those of rows lost with their process."""
    needed: int = 0
    """Denoiser forwards that the run without faults computes, counted per row."""
    recover_s: dict[str, list[float]] = field(default_factory=lambda: {"actor": [], "node": [], "driver": []})
    """The seconds from each fault of this kind until the replacements of what it ended had finished a row."""
    runs: int = 0
    """The number of times that the job was submitted."""
    exits: list[str] = field(default_factory=list)
    """The last output of each run that failed by itself."""
    findings: list[str] = field(default_factory=list)
    """The output of `verify` if it found something wrong."""
    seconds: float = 0.0

    def __add__(self, other: "Verdict") -> "Verdict":
        recover_s = {kind: self.recover_s[kind] + other.recover_s[kind] for kind in self.recover_s}
        values = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__ if name != "recover_s"}
        return Verdict(recover_s=recover_s, **values)

    @property
    def right(self) -> bool:
        """Return True if every row is in the output once, as without faults, and `verify` finds nothing wrong."""
        return not (self.lost or self.duplicated or self.changed or self.condemned or self.findings)

    @property
    def repeated_share(self) -> float:
        """Return `repeated` as a share of the rows."""
        return self.repeated / self.rows

    def medians(self) -> dict[str, float | None]:
        """Return the median of recover_s for each kind of fault; None if nothing was measured."""
        return {kind: round(statistics.median(x), 2) if x else None for kind, x in self.recover_s.items()}


@dataclass(frozen=True, slots=True)
class WrongRows:
    """The rows of an output that are not as they must be, each kind sorted."""

    lost: list[str]
    """The keys of rows that are in no part."""
    doubled: list[str]
    """The keys of rows that are in the parts more than once."""
    changed: list[str]
    """One text for each row that is in a part but not as expected, condemned rows excluded."""
    condemned: list[str]
    """The keys of healthy rows that became error rows."""


def compare(output: str, expected: Rows) -> WrongRows:
    """Compare the rows in the parts of an output with the expected ones."""
    found = Counter[str]()
    changed, condemned = [], set()
    for key, row in read_output(Storage(output)):
        found[key] += 1
        if row == expected.get(key):
            continue
        if key in expected and row[FINISH_REASON] == "error" != expected[key][FINISH_REASON]:
            condemned.add(key)
        else:
            changed.append(f"{key}: {row} instead of {expected.get(key)}")
    doubled = sorted(key for key, count in found.items() if count > 1)
    return WrongRows(sorted(expected.keys() - found.keys()), doubled, sorted(changed), sorted(condemned))


def judge(history: History, expected: Rows) -> Verdict:
    """Read the parts and the logs that a job left, run `verify`, and return the verdict. `expected`: the rows without
    faults."""
    wrong = compare(history.output, expected)
    whole, said = verify(history.output)
    lives = read_lives(history.logs)
    times = times_finished(lives)
    verdict = Verdict(
        rows=len(expected),
        faults=Counter(killed.kind for killed in history.killed) + history.injected,
        lost=wrong.lost,
        duplicated=wrong.doubled,
        changed=wrong.changed,
        condemned=wrong.condemned,
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
        ends = [end for end in found_ends if end is not None]  # None: no work was left, or the driver died too
        if killed.kind in verdict.recover_s and ends:
            verdict.recover_s[killed.kind].append(max(ends) - killed.time)
    return verdict


def read_output(storage: Storage) -> Iterable[tuple[str, tuple[object, ...]]]:
    """Yield the key and COLUMNS of every row in the parts.

    The key is made of the row's file and its number there. A row whose id is another one has a key that no row should
    have.
    """
    for part in storage.list_files("", "part-*.parquet"):
        table = pq.read_table(storage.open(part.name, part.size), columns=["id", "source_file", "source_row", *COLUMNS])
        for name, file, number, *row in zip(*(column.to_pylist() for column in table.columns), strict=True):
            key = f"{file}#{number}"
            yield key if name == key else f"{key} with id {name}", tuple(row)


def verify(output: str) -> tuple[bool, str]:
    """Return whether `python -m pipeline verify` finds nothing wrong, and its output."""
    command = [sys.executable, "-m", "pipeline", "verify", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode == 0, (done.stdout + done.stderr).strip()
