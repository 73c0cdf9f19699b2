"""Compares this pipeline with Ray Data on the same rows, each on a new cluster, with an engine that computes nothing.

The pipeline does all that it does in a real job: plan, claim of the output, segments every second, each part published
once with its record, and the manifest. Ray Data reads, maps and writes Parquet; its actors only add the four columns
that every job would keep. The pipeline's replicas also tokenize, queue, hand each row to the engine by itself and write
its statistics. Both start their two actors within the measured time.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from pipeline.config.job import Job
from pipeline.driver.run import run_job
from pipeline.planning.plan import Plan
from tests.benchmarks.pipeline_noop import TEXT, TOKENS, NoOpMaker
from tests.benchmarks.pipeline_results import Compared
from workers.cluster.pool import RayPool
from workers.replica.build import ReplicaSpec

ROWS, FILES = 200_000, 20
REPLICAS = 2
FLUSH_S = 1.0
"""Seconds between flushes. With the default of 30 s no segment would be saved, because no unit takes that long."""
CPUS = 4
"""CPUs that the cluster declares: Ray Data's tasks for reading and writing need some in addition to its actors."""


class NoOp:
    """The function that Ray Data's actors apply to each batch."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the same completion for every row, with the fewest columns that a job would keep."""
        rows = len(batch["prompt"])
        return {
            "id": batch["id"],
            "completion": np.full(rows, TEXT, object),
            "finish_reason": np.full(rows, "stop", object),
            "prompt_tokens": np.array([len(prompt) for prompt in batch["prompt"]], np.int32),
            "completion_tokens": np.full(rows, len(TOKENS), np.int32),
        }


def write_input(folder: Path, rows: int, files: int) -> None:
    """Write prompts of about 50 letters."""
    folder.mkdir()
    for number in range(files):
        ids = range(number * rows // files, (number + 1) * rows // files)
        prompts = [f"prompt number {i} of a corpus whose rows are all short" for i in ids]
        pq.write_table(pa.table({"id": [f"row-{i}" for i in ids], "prompt": prompts}), folder / f"{number:03}.parquet")


def run_pipeline(source: Path, out: Path) -> float:
    """Run the job and return the processor time of this process, in milliseconds per unit.

    Raises AssertionError if a row is missing.
    """
    job = Job.model_validate(
        {
            "input": {"path": str(source), "id_column": "id"},
            "output": {"path": str(out), "rows_per_file": 10_000},
            "model": {"checkpoint": "builtin:noise"},
            "workers": {"gpus": 0, "replicas": REPLICAS},
            "flush": {"seconds": FLUSH_S},
        }
    )

    def make_pool(plan: Plan, units: int, tell: Callable[[str], None]) -> RayPool:
        maker = NoOpMaker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts))
        return RayPool(maker, job.workers, units, tell)

    began = time.process_time()
    outcome = run_job(job, make_pool, threading.Event())
    assert outcome.totals.ok == outcome.totals.rows == _rows_in(source)
    return 1e3 * (time.process_time() - began) / outcome.units


def run_ray_data(source: Path, out: Path) -> None:
    """Run the same rows through Ray Data. Raises AssertionError if a row is missing."""
    rows = ray.data.read_parquet(str(source), override_num_blocks=FILES)
    made = rows.map_batches(NoOp, compute=ray.data.ActorPoolStrategy(size=REPLICAS), num_cpus=1)
    made.write_parquet(str(out))
    assert _rows_in(out) == _rows_in(source)


def compare(folder: Path, rows: int = ROWS, rounds: int = 2) -> Compared:
    """Measure both alternately, in reversed order in every second round.

    Each run gets a new cluster, because the previous run would leave warm processes behind. Starting it is not
    measured.
    """
    source = folder / "in"
    write_input(source, rows, FILES)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False  # the newer one gives all files to one actor
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    seconds: dict[str, list[float]] = {"pipeline": [], "ray_data": []}
    drivers: list[float] = []
    for number in range(rounds):
        for name in sorted(seconds, reverse=number % 2 == 1):
            with _cluster():
                out, began = folder / f"{name}-{number}", time.perf_counter()
                if name == "pipeline":
                    drivers.append(run_pipeline(source, out))
                else:
                    run_ray_data(source, out)
                seconds[name].append(time.perf_counter() - began)
    return Compared(rows, tuple(seconds["pipeline"]), tuple(seconds["ray_data"]), sum(drivers) / len(drivers))


@contextmanager
def _cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _rows_in(folder: Path) -> int:
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
