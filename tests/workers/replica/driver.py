"""Runs a driver process with one replica on a marked engine.

Usage: `python -m tests.workers.replica.driver FOLDER STEP_S ROWS`. FOLDER/job.yaml is the job. A step of the engine
takes STEP_S seconds once the engine has finished ROWS rows. The process ends like the command line: with 0, or with 1
and one line on stderr. SIGTERM stops it. It looks for newer drivers every second.
"""

import functools
import signal
import sys
import threading
from pathlib import Path

import pipeline.driver.run
from pipeline.config.loader import load_job
from pipeline.core.errors import TwoTowerError
from pipeline.output.claim import Claim
from tests.workers.units.engines import MarkedMaker
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool


def main(folder: Path, step_s: float, free_rows: int) -> None:
    pipeline.driver.run.Claim = functools.partial(Claim, check_s=1.0)  # type: ignore[attr-defined,assignment]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    job = load_job(str(folder / "job.yaml"), ())
    try:
        pipeline.driver.run.run_job(
            job,
            lambda plan, _units, _tell: LocalPool(
                MarkedMaker(
                    ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts),
                    step_s=step_s,
                    free_rows=free_rows,
                    flushed=True,
                )
            ),
            stop,
        )
    except TwoTowerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
