"""One run of the job in a process of its own: `python -m tests.chaos.driver JOB.json LOGS NUMBER TURN_S [local]`.

What `python -m pipeline run` does, with the made-up engine in the replicas; `local` is its --local.
"""

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.dispatch import Pool
from pipeline.errors import TwoTowerError
from pipeline.job import Job
from pipeline.plan import Plan
from pipeline.progress import open_progress
from pipeline.run import run_job
from tests.chaos.engine import Maker
from workers.build import ReplicaSpec
from workers.local_pool import LocalPool
from workers.pool import RayPool


def main() -> int:
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    logs, number, turn_s = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

    def make_pool(plan: Plan, units: int, tell: Callable[[str], None]) -> Pool:
        maker = Maker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema), logs, number, turn_s)
        return LocalPool(maker) if sys.argv[5:] else RayPool(maker, job.workers, units, tell)

    try:
        run_job(job, make_pool, threading.Event(), functools.partial(open_progress, interval_s=5.0))
    except TwoTowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
