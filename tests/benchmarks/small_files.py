"""`python -m tests.benchmarks.small_files`: compares jobs over the same 300 prompts in files and units of other sizes.

Each job is a whole run with the local pool in this process: `builtin:tiny` on the CPU, one torch thread, 16 rows at
once, the settings of jobs/demo.yaml. All of them must give the same completions. Two tables are printed:

    files    300 files of one row, 60 files of 5 rows, one file of 300 rows, with 50 rows to a unit. Aims: batch rows
             and forwards within 5 % of those of the one file, rows per second within 20 %
    units    units of one row each: of the one file with rows_per_file 1, and of 300 files in an output that was begun
             when a unit had rows of one file only

The jobs of a table run in turns, in reversed order in every second round, and each ratio is the median over the rounds.
The columns:

    forwards     of the denoiser, in the whole job
    batch rows   mean over all rows of column batch_rows, the number of rows that are computed together
    rows/s       from the loaded model to the last published part, by the wall clock
    of the processor    the same by the processor time of this process: other processes do not count, nor does waiting

`--quick` takes the first 60 prompts, short completions and one round.
"""

import io
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipeline.config.loader import load_job
from pipeline.driver.run import run_job
from pipeline.monitoring.progress import LineDisplay
from pipeline.output import begun
from pipeline.planning.packing import StoredUnits
from pipeline.planning.plan import Plan
from pipeline.planning.prompts import Begun
from workers.replica.build import ReplicaSpec, make_runner
from workers.replica.local_pool import LocalPool
from workers.units.runner import UnitRunner

ROWS, ROUNDS = 300, 3
PROMPTS = "jobs/demo_prompts.parquet"
ONE_FILE = "one file"
"""The corpus that all others are compared with."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """An input for a job, and how it is cut into units."""

    rows_a_file: int | None
    """The number of rows in each file; None if one file has all rows."""
    rows_a_unit: int = 50
    rules: int = 2
    """The version of the rules by which units are cut (pipeline.core.types.UNIT_RULES)."""


FILES = {ONE_FILE: Corpus(None), "files of 5 rows": Corpus(5), "files of one row": Corpus(1)}
UNITS = {
    ONE_FILE: Corpus(None),
    "one file, rows_per_file 1": Corpus(None, rows_a_unit=1),
    "files of one row, old output": Corpus(1, rules=1),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a job."""

    files: int
    units: int
    parts: int
    forwards: int
    batch_rows: float
    rows_per_s: float
    rows_per_processor_s: float
    completions: Mapping[str, str]
    """The completion of each prompt, by its id."""


def write_corpus(folder: Path, rows: pa.Table, rows_a_file: int | None) -> int:
    """Write rows as Parquet files in a new folder, and return the number of files. Their names sort as the rows do."""
    folder.mkdir(parents=True)
    size = rows_a_file or rows.num_rows
    for first in range(0, rows.num_rows, size):
        pq.write_table(rows.slice(first, size), folder / f"{first:06}.parquet")
    return -(-rows.num_rows // size)


class Watch:
    """Makes the pool of one job. It counts the forwards of its engine and times it from the loaded model to the end."""

    def __init__(self) -> None:
        self.forwards = 0
        self.began = self.ended = (0.0, 0.0)

    def make_pool(self, job: Any, plan: Plan) -> LocalPool:
        """Return the pool for the job."""
        watch, spec = self, ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)

        class Pool(LocalPool):
            def close(self) -> None:
                watch.ended = watch.ended if any(watch.ended) else _now()
                super().close()

        return Pool(lambda replica: self._make_runner(spec, replica))

    def _make_runner(self, spec: ReplicaSpec, replica: str) -> UnitRunner:
        runner = make_runner(spec, replica)
        backend: Any = runner._engine.backend  # type: ignore[attr-defined]  # it is an Engine, not just EngineLike
        denoise: Callable[..., Any] = backend.denoise

        def counted(rows: Sequence[Any]) -> Any:
            self.forwards += 1
            return denoise(rows)

        backend.denoise = counted
        self.began = _now()
        return runner


def run_corpus(folder: Path, rows: pa.Table, corpus: Corpus, overrides: Sequence[str] = ()) -> Figures:
    """Run one job over the rows, with input and output in `folder`, which must not exist."""
    files = write_corpus(folder / "in", rows, corpus.rows_a_file)
    settings = {
        "input.path": folder / "in",
        "output.path": folder / "out",
        "output.rows_per_file": corpus.rows_a_unit,
        "workers.replicas": 1,
    }
    job = load_job("jobs/demo.yaml", [*(f"{name}={value}" for name, value in settings.items()), *overrides])
    watch = Watch()
    with _begun_with(corpus.rules):
        outcome = run_job(
            job,
            lambda plan, _units, _tell: watch.make_pool(job, plan),
            threading.Event(),
            lambda: LineDisplay(io.StringIO()),
        )
    parts = sorted((folder / "out").glob("part-*.parquet"))
    done: dict[str, list[Any]] = pa.concat_tables(pq.read_table(part) for part in parts).to_pydict()
    assert len(done["id"]) == rows.num_rows
    wall, processor = (end - start for start, end in zip(watch.began, watch.ended, strict=True))
    return Figures(
        files,
        outcome.units,
        len(parts),
        watch.forwards,
        statistics.fmean(done["batch_rows"]),
        rows.num_rows / wall,
        rows.num_rows / processor,
        dict(zip(done["id"], done["completion"], strict=True)),
    )


def compare(
    folder: Path, corpora: Mapping[str, Corpus], rows: pa.Table, rounds: int, overrides: Sequence[str] = ()
) -> dict[str, list[Figures]]:
    """Return the figures of each corpus in each round. Raises AssertionError if completions differ."""
    found: dict[str, list[Figures]] = {name: [] for name in corpora}
    for number in range(rounds):
        for name in list(corpora)[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                found[name].append(run_corpus(Path(place) / "job", rows, corpora[name], overrides))
    for runs in found.values():
        assert all(run.completions == found[ONE_FILE][0].completions for run in runs), "completions differ"
    return found


def show(title: str, found: Mapping[str, Sequence[Figures]], console: Console) -> None:
    """Print the table of `compare`. Each figure but the counts is a median over the rounds, with its ratio to that of
    the one file in brackets."""
    heads = ("files", "units", "parts", "forwards", "batch rows", "rows/s", "of the processor")
    table = Table("input", *heads, title=title, title_justify="left")
    for name, runs in found.items():

        def cell(attribute: str, form: str, runs: Sequence[Figures] = runs) -> str:
            ours, base = ([getattr(run, attribute) for run in each] for each in (runs, found[ONE_FILE]))
            ratio = statistics.median(a / b for a, b in zip(ours, base, strict=True))
            return f"{statistics.median(ours):{form}} ({ratio:.2f} x)"

        last = runs[-1]
        rates = (cell("rows_per_s", ".1f"), cell("rows_per_processor_s", ".1f"))
        counts = (str(last.files), str(last.units), str(last.parts))
        table.add_row(name, *counts, cell("forwards", ",.0f"), cell("batch_rows", ".2f"), *rates)
    console.print(table)


@contextmanager
def _begun_with(rules: int) -> Iterator[None]:
    """Let jobs be planned as if their output had been begun with this version of the rules for units."""
    with patch.object(begun, "read_begun", lambda _job: (Begun(), StoredUnits(rules))):
        yield


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    console, quick = Console(width=None if sys.stdout.isatty() else 120), "--quick" in sys.argv[1:]
    pa.array([])  # imports pandas if it is installed; later the import would count for the first job
    rows, rounds = pq.read_table(PROMPTS).slice(0, 60 if quick else ROWS), 1 if quick else ROUNDS
    overrides = ["generation.max_new_tokens=32"] if quick else []
    with tempfile.TemporaryDirectory(prefix="twotower-small-files-") as folder:
        for title, corpora, times in (("files", FILES, rounds), ("units of one row", UNITS, 1)):
            show(title, compare(Path(folder), corpora, rows, times, overrides), console)


if __name__ == "__main__":
    main()
