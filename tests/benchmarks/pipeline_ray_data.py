"""The same rows through this pipeline and through Ray Data, each on a new cluster; the engine computes nothing.

The pipeline does all that it does in a real job: plan, claim, segments every second, each part published once with its
record, manifest. Ray Data reads, maps and writes Parquet; its actors add the four columns that a job would keep at
least, where the pipeline's replicas also tokenise, queue, hand each row to the engine by itself and write its
statistics. Both start their two actors within the time that is measured.
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
"""By default 30: no unit of this job takes so long."""
CPUS = 4
"""Of the cluster, by name: Ray Data's tasks for reading and writing need some beside its actors."""


class NoOp:
    """What Ray Data's actors do with a batch."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same completions, with the least that a job would keep of a row."""
        rows = len(batch["prompt"])
        return {
            "id": batch["id"],
            "completion": np.full(rows, TEXT, object),
            "finish_reason": np.full(rows, "stop", object),
            "prompt_tokens": np.array([len(prompt) for prompt in batch["prompt"]], np.int32),
            "completion_tokens": np.full(rows, len(TOKENS), np.int32),
        }


def write_input(folder: Path, rows: int, files: int) -> None:
    """Prompts of about 50 letters."""
    folder.mkdir()
    for number in range(files):
        ids = range(number * rows // files, (number + 1) * rows // files)
        prompts = [f"prompt number {i} of a corpus whose rows are all short" for i in ids]
        pq.write_table(pa.table({"id": [f"row-{i}" for i in ids], "prompt": prompts}), folder / f"{number:03}.parquet")


def run_pipeline(source: Path, out: Path) -> float:
    """-> processor time of this process, in milliseconds a unit. Raises where a row is missing."""
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
        maker = NoOpMaker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema))
        return RayPool(maker, job.workers, units, tell)

    began = time.process_time()
    outcome = run_job(job, make_pool, threading.Event())
    assert outcome.totals.ok == outcome.totals.rows == _rows_in(source)
    return 1e3 * (time.process_time() - began) / outcome.units


def run_ray_data(source: Path, out: Path) -> None:
    """Raises where a row is missing."""
    rows = ray.data.read_parquet(str(source), override_num_blocks=FILES)
    made = rows.map_batches(NoOp, compute=ray.data.ActorPoolStrategy(size=REPLICAS), num_cpus=1)
    made.write_parquet(str(out))
    assert _rows_in(out) == _rows_in(source)


def compare(folder: Path, rows: int = ROWS, rounds: int = 2) -> Compared:
    """Both in turns, first the one, then the other first, each time on a new cluster: whichever ran last would leave
    warm processes behind. Starting the cluster is not measured."""
    source = folder / "in"
    write_input(source, rows, FILES)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False  # the newer one gives all files to one of the actors
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
