"""Runs the job once in a process of its own: `python -m tests.chaos.driver JOB.json LOGS NUMBER TURN_S [local]`.

It does what `python -m pipeline run` does, but its replicas have the engine without weights (tests.chaos.engine).
NUMBER is the number of the run, for the names of the logs; TURN_S is how long a turn of the engine lasts; `local` is
like `--local`.
"""

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.config.job import Job
from pipeline.core.errors import TwoTowerError
from pipeline.driver.dispatcher import Pool
from pipeline.driver.run import run_job
from pipeline.monitoring.progress import open_display
from pipeline.planning.plan import Plan
from tests.chaos.engine import Maker
from workers.cluster.pool import RayPool
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool


def main() -> int:
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    logs, number, turn_s = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

    def make_pool(plan: Plan, units: int, tell: Callable[[str], None]) -> Pool:
        maker = Maker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts), logs, number, turn_s)
        return LocalPool(maker) if sys.argv[5:] else RayPool(maker, job.workers, units, tell)

    try:
        run_job(job, make_pool, threading.Event(), functools.partial(open_display, interval_s=5.0))
    except TwoTowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
