"""`python -m tests.benchmarks.slow_store`: compares 1,000 objects of one row with one object of 1,000 rows on a store
whose answers take 30 ms.

The store is a real S3 server on this machine behind a proxy that delays every answer (tests.benchmarks.delay_proxy).
Input and output are on it. The corpora are measured in turns, in reversed order in every second round. The columns are
medians over the rounds, with the ratio to the one object in brackets. Aim: the whole job within 1.5 x.

    plan       make_plan: listing and footers
    read       all units by one UnitReader, without anything else
    requests   to the store, for the plan, for reading and for the whole job
    job        the whole job in this process from its settings to the manifest: `builtin:tiny` on one thread, settings
               of jobs/demo.yaml, in seconds of wall clock
    computing nothing    the same with an engine that computes nothing: all that the pipeline itself takes

`--quick` takes 100 rows, short completions and one round.
"""

import io
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
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

from pipeline.config.job import Job
from pipeline.config.loader import load_job
from pipeline.driver.run import run_job
from pipeline.monitoring.progress import LineDisplay
from pipeline.planning.plan import Plan, make_plan
from pipeline.storage.storage import Storage
from tests.benchmarks.delay_proxy import delay_proxy
from tests.benchmarks.pipeline_noop import NoOpMaker
from tests.benchmarks.small_files import PROMPTS, write_corpus
from tests.end_to_end.s3.server import BUCKET, aws_variables, s3_server
from tests.pipeline.cases import reader_of
from workers.replica.build import ReplicaSpec, make_runner
from workers.replica.local_pool import LocalPool
from workers.replica.replica import MakeRunner

ROWS, ROWS_A_UNIT, ROUNDS, DELAY_S = 1000, 250, 3, 0.030
ONE_OBJECT = "one object"
OBJECTS = {ONE_OBJECT: None, "objects of one row": 1}
"""The corpora, with the rows of each object; None if one object has all rows."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The seconds and the numbers of requests of one corpus in one round."""

    plan_s: float
    read_s: float
    nothing_s: float
    job_s: float
    plan_requests: int
    read_requests: int
    job_requests: int


def prompts(rows: int) -> pa.Table:
    """Return the prompts of the demo, over and over, with other ids."""
    demo = pq.read_table(PROMPTS, columns=["prompt"])["prompt"].to_pylist()
    return pa.table({"id": [f"{n:06}" for n in range(rows)], "prompt": [demo[n % len(demo)] for n in range(rows)]})


def upload(folder: Path, url: str, rows: pa.Table, rows_a_file: int | None) -> None:
    """Write rows as objects below a URL."""
    write_corpus(folder, rows, rows_a_file)
    store = Storage(url)
    for file in folder.iterdir():
        store.write(file.name, file.read_bytes())


def measure(path: str, output: str, overrides: Sequence[str]) -> Figures:
    """Measure a corpus. `output`: the URL of a folder that does not exist."""
    settings = {"input.path": path, "input.carry": "[]", "output.rows_per_file": ROWS_A_UNIT, "workers.replicas": 1}

    def job_to(name: str) -> Job:
        lines = [f"{key}={value}" for key, value in settings.items()]
        return load_job("jobs/demo.yaml", [*lines, f"output.path={output}/{name}", *overrides])

    job = job_to("real")
    with _requests() as planned:
        plan_s, plan = _timed(lambda: make_plan(job, checkpoint_identity="none"))
    with _requests() as read:
        read_s, _ = _timed(lambda: _read(job, plan))
    nothing_s, _ = _timed(lambda: _run(job_to("nothing"), NoOpMaker))
    with _requests() as ran:
        job_s, _ = _timed(lambda: _run(job, lambda spec: lambda replica: make_runner(spec, replica)))
    return Figures(plan_s, read_s, nothing_s, job_s, planned.total(), read.total(), ran.total())


def compare(
    folder: Path, endpoint: str, rows: int, rounds: int, overrides: Sequence[str] = (), *, delay_s: float = DELAY_S
) -> dict[str, list[Figures]]:
    """Return the figures of each corpus in each round. `endpoint`: the URL of the server without delay."""
    from s3fs import S3FileSystem  # imported late, as the pipeline does

    found: dict[str, list[Figures]] = {name: [] for name in OBJECTS}
    table = prompts(rows)
    for place, size in enumerate(OBJECTS.values()):
        with patch.dict(os.environ, aws_variables(endpoint)):
            upload(folder / str(place), f"s3://{BUCKET}/in-{place}", table, size)
    S3FileSystem.clear_instance_cache()  # instances remember the endpoint that they were made with
    with delay_proxy(endpoint, delay_s) as slow, patch.dict(os.environ, aws_variables(slow)):
        for number in range(rounds):
            corpora = list(enumerate(OBJECTS))
            for place, name in corpora if number % 2 == 0 else reversed(corpora):
                output = f"s3://{BUCKET}/out-{place}-{number}"
                found[name].append(measure(f"s3://{BUCKET}/in-{place}/", output, overrides))
    S3FileSystem.clear_instance_cache()
    return found


def show(found: Mapping[str, Sequence[Figures]], console: Console) -> None:
    """Print the table."""
    table = Table("input", "plan", "read", "requests", "computing nothing", "job", title="a store with 30 ms latency")
    for name, runs in found.items():

        def cell(attribute: str, runs: Sequence[Figures] = runs) -> str:
            ours, base = ([getattr(run, attribute) for run in each] for each in (runs, found[ONE_OBJECT]))
            ratio = statistics.median(a / b for a, b in zip(ours, base, strict=True))
            return f"{statistics.median(ours):.2f} s ({ratio:.2f} x)"

        last = runs[-1]
        requests = f"{last.plan_requests:,}, {last.read_requests:,}, {last.job_requests:,}"
        table.add_row(name, cell("plan_s"), cell("read_s"), requests, cell("nothing_s"), cell("job_s"))
    console.print(table)


def _read(job: Job, plan: Plan) -> None:
    reader = reader_of(job)
    try:
        for unit in plan.units:
            reader.read(unit)
    finally:
        reader.close()


def _run(job: Job, maker: Callable[[ReplicaSpec], MakeRunner]) -> None:
    def make_pool(plan: Plan, _units: int, _tell: Callable[[str], None]) -> LocalPool:
        return LocalPool(maker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)))

    run_job(job, make_pool, threading.Event(), lambda: LineDisplay(io.StringIO()))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


@contextmanager
def _requests() -> Iterator[Counter[str]]:
    """Count the requests of this process to S3 by their method."""
    from s3fs import S3FileSystem

    counted: Counter[str] = Counter()
    original = S3FileSystem._call_s3

    async def counting(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        counted[method] += 1
        return await original(self, method, *arguments, **options)

    with patch.object(S3FileSystem, "_call_s3", counting):
        yield counted


def main() -> None:
    console, quick = Console(width=None if sys.stdout.isatty() else 120), "--quick" in sys.argv[1:]
    pa.array([])  # imports pandas if it is installed; later the import would count for the first corpus
    rows, rounds = (100, 1) if quick else (ROWS, ROUNDS)
    overrides = ["generation.max_new_tokens=32"] if quick else []
    with tempfile.TemporaryDirectory(prefix="twotower-slow-store-") as folder:
        (Path(folder) / "server").mkdir()
        with s3_server(Path(folder) / "server") as endpoint:
            show(compare(Path(folder), endpoint, rows, rounds, overrides), console)


if __name__ == "__main__":
    main()
