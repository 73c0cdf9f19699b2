"""`python -m tests.benchmarks.many_files [FILES] [ROWS A FILE]`: measures the driver with very many small input files.

Makes a corpus (by default 2,000,000 rows in 100,000 files, in folders of 1,000) on the local disk, and the whole output
of a job over it with made-up completions. Each step runs in a process of its own; its seconds and peak resident MiB are
printed. `plan`, `open` and `resume` include all that comes before them in a run: the listing, and the plan.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.job import Job
from pipeline.core.types import Totals
from pipeline.input.files import list_input
from pipeline.maintenance.verify import verify
from pipeline.monitoring.status import read_job
from pipeline.output.layout import PLAN
from pipeline.output.ledger import Ledger
from pipeline.planning.plan import Plan
from tests.pipeline.cases import make_job, plan_of, publish

FILES, ROWS_A_FILE = 100_000, 20
FILES_A_FOLDER = 1_000
PUBLISHERS = 2
"""The number of processes that publish the parts."""
UNITS_A_TASK = 20
"""The number of units that such a process publishes at a time."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The input of the job: `files` files of `rows` rows each, in `folder`, which also has the output."""

    folder: str
    files: int
    rows: int

    @property
    def job(self) -> Job:
        return make_job(f"{self.folder}/in", f"{self.folder}/out")


Step = Callable[[Corpus], str]


def write_corpus(corpus: Corpus) -> str:
    """Write the input. Its files are copies of one file, with other digits in the prompts, because pyarrow would need a
    millisecond for each."""
    number, sink = "{:08}", pa.BufferOutputStream()
    table = pa.table({"prompt": [f"prompt {number.format(0)}, row {row}" for row in range(corpus.rows)]})
    # Without compression and dictionary, the prompts stand in the file as they are.
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    template = sink.getvalue().to_pybytes()
    for file in range(corpus.files):
        path = Path(corpus.folder, f"in/{file // FILES_A_FOLDER:05}/{file:08}.parquet")
        if file % FILES_A_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(template.replace(number.format(0).encode(), number.format(file).encode()))
    return f"{corpus.files * corpus.rows:,} rows in {corpus.files:,} files of {len(template):,} bytes"


def measure_listing(corpus: Corpus) -> str:
    return f"{len(list_input(corpus.job.input.path)[1]):,} files"


def measure_plan(corpus: Corpus) -> str:
    plan = plan_of(corpus.job)
    assert plan.rows == corpus.files * corpus.rows
    return f"{plan.rows:,} rows, {len(plan.units):,} units"


def measure_open(corpus: Corpus) -> str:
    _, said = _open(corpus.job)
    return f"{said}; plan.json has {Path(corpus.job.output.path, PLAN).stat().st_size / 2**20:.1f} MiB"


def _open(job: Job) -> tuple[Plan, str]:
    began = time.perf_counter()
    plan = plan_of(job)
    planned = time.perf_counter()
    Ledger(job.output.path, plan.fingerprint.digest).open(plan, job)
    return plan, f"plan {planned - began:.2f} s, open {time.perf_counter() - planned:.2f} s"


def write_parts(corpus: Corpus) -> str:
    """Publish all units, and complete the job."""
    job, plan = corpus.job, plan_of(corpus.job)
    tasks = [slice(first, first + UNITS_A_TASK) for first in range(0, len(plan.units), UNITS_A_TASK)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PUBLISHERS, spawn, _Publisher.start, (job, plan)) as pool:
        totals = sum(pool.map(_Publisher.publish, tasks), Totals())
    Ledger(job.output.path, plan.fingerprint.digest).complete(plan, job, totals, seconds=1.0)
    return f"{totals.rows:,} rows in {len(plan.units):,} parts"


class _Publisher:
    """The job and the plan in a process that publishes parts."""

    job: Job
    plan: Plan

    @classmethod
    def start(cls, job: Job, plan: Plan) -> None:
        cls.job, cls.plan = job, plan

    @classmethod
    def publish(cls, units: slice) -> Totals:
        return sum((each.totals for each in publish(cls.job, cls.plan, cls.plan.units[units])), Totals())


def measure_resume(corpus: Corpus) -> str:
    """Measure all that a run does before it hands out its first unit; here it finds that all units are done."""
    job = corpus.job
    plan, said = _open(job)
    began = time.perf_counter()
    done = Ledger(job.output.path, plan.fingerprint.digest).finished(plan)
    assert len(done) == len(plan.units)
    return f"{said}, {len(done):,} finished parts {time.perf_counter() - began:.2f} s"


def measure_status(corpus: Corpus) -> str:
    status = read_job(corpus.job.output.path)
    return f"{status.state}, {status.folder.rows_done:,} rows in {status.folder.units_done:,} units"


def measure_verify(corpus: Corpus) -> str:
    found = verify(corpus.job.output.path)
    assert not found.problems, found.problems[:3]
    return found.summary()


STEPS: dict[str, Step] = {
    "write corpus": write_corpus,
    "list": measure_listing,
    "plan": measure_plan,
    "open": measure_open,
    "write parts": write_parts,
    "resume, all done": measure_resume,
    "status": measure_status,
    "verify": measure_verify,
}


def run_step(name: str, corpus: Corpus) -> None:
    """Run one step, in a process of its own, and print its time and memory."""
    began = time.perf_counter()
    said = STEPS[name](corpus)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name:16} {seconds:7.2f} s {peak:6} MiB  {said}", flush=True)


def main() -> None:
    files = int(sys.argv[1]) if len(sys.argv) > 1 else FILES
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else ROWS_A_FILE
    with tempfile.TemporaryDirectory(prefix="twotower-many-files-") as folder:
        for name in STEPS:
            arguments = name, Corpus(folder, files, rows)
            process = multiprocessing.get_context("spawn").Process(target=run_step, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} failed")


if __name__ == "__main__":
    main()
