"""`make bench-scale`: measures memory and time of everything but the model, with many rows in two replicas on Ray.

The replicas' engine computes nothing, so only planning, reading, dispatching and writing remain. The input is one
Parquet file of one row group, the worst case for reading by ranges. After every tenth of the units it prints a line:
resident MiB of the driver and of each replica, and the time since the first unit was handed out.
"""

import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.job import Job
from pipeline.core.events import Event, UnitDone
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.output.ledger import Ledger
from pipeline.planning.plan import make_plan
from tests.workers.fakes import FakeMaker
from workers.cluster.pool import RayPool
from workers.replica.build import ReplicaSpec

ROWS = 2_000_000
ROWS_PER_FILE = 10_000


def resident_mib(process: str) -> int:
    """Return the resident memory of a process in MiB. `process`: its id or "self"."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


def write_input(path: Path, rows: int) -> None:
    """Write short prompts as one row group."""
    table = pa.table({"prompt": [f"prompt number {i}" for i in range(rows)]})
    pq.write_table(table, path, row_group_size=rows)


def measure(folder: Path) -> None:
    """Run the job and print the figures."""
    job = Job.model_validate(
        {
            "input": {"path": str(folder / "in.parquet")},
            "output": {"path": str(folder / "out"), "rows_per_file": ROWS_PER_FILE},
            "model": {"checkpoint": "builtin:noise"},
            "workers": {"gpus": 0, "replicas": 2},
        }
    )
    began = time.perf_counter()
    plan = make_plan(job, checkpoint_identity="none")
    seconds = time.perf_counter() - began
    print(f"plan: {plan.rows:,} rows, {len(plan.units)} units in {seconds:.2f} s, driver {resident_mib('self')} MiB")
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    ledger.open(plan, job)
    replicas = folder / "replicas"
    replicas.mkdir()
    maker = FakeMaker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts), replicas, max_rows=256)
    pool = RayPool(maker, job.workers, len(plan.units), print)
    done, began = 0, time.perf_counter()

    def show(event: Event | None) -> None:
        nonlocal done
        if isinstance(event, UnitDone):
            done += 1
            if done % max(1, len(plan.units) // 10) == 0:
                sizes = [resident_mib(file.read_text().split()[0]) for file in sorted(replicas.iterdir())]
                elapsed = time.perf_counter() - began
                rate = done * ROWS_PER_FILE / elapsed
                print(
                    f"{done} units: driver {resident_mib('self')} MiB, replicas {sizes} MiB, "
                    f"{elapsed:.1f} s, {rate:,.0f} rows/s"
                )

    try:
        dispatch(plan.units, {}, pool, RetryPolicy(attempts=1, max_error_rate=0.0), threading.Event(), show)
    finally:
        pool.close()


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    folder = Path(tempfile.mkdtemp(prefix="twotower-scale-"))
    try:
        # in a process of its own, so that its memory does not count as the driver's
        writer = multiprocessing.get_context("spawn").Process(target=write_input, args=(folder / "in.parquet", rows))
        writer.start()
        writer.join()
        measure(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
