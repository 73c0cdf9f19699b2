"""Runs the job once in a process of its own: `python -m tests.chaos.driver JOB.json LOGS NUMBER TURN_S [FLAGS]`.

It does what `python -m pipeline run` does, but its replicas have the engine without weights (tests.chaos.engine).
NUMBER is the number of the run, for the names of the logs; TURN_S is how long a turn of the engine lasts; FLAGS is the
folder of the flags that switch faults on (tests.chaos.sabotage).
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
from pipeline.output.claim import Claim
from pipeline.planning.plan import Plan
from pipeline.storage import retrying
from tests.chaos.engine import Maker
from tests.chaos.sabotage import Flags, install
from workers.replica import local_pool
from workers.replica.build import ReplicaSpec

LOOK_S, LOCAL_PATIENCE_S, FLUSH_S = 0.3, 1.0, 2.0
"""The seconds between two looks for a newer driver, those for which an operation on a local disk is tried again, and
those that a local replica has for its last flush, in runs with flags: less than usual, so that scenarios are short."""


def drive(job_file: Path, logs: Path, number: int, turn_s: float, *, local: bool, flags: Flags | None = None) -> int:
    """Run the job and return the exit code. `local`: with one replica in this process, as with `--local`."""
    job = Job.model_validate_json(job_file.read_text())
    if flags is not None:
        install(flags, Path(job.output.path))
        defaults = Claim.__init__.__kwdefaults__ or {}
        assert "check_s" in defaults, defaults
        defaults["check_s"] = LOOK_S
        retrying.LOCAL_PATIENCE_S = LOCAL_PATIENCE_S
        vars(local_pool).update(FLUSH_S=FLUSH_S)

    def make_pool(plan: Plan, units: int, tell: Callable[[str], None]) -> Pool:
        spec = ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)
        maker = Maker(spec, logs, number, turn_s, flags)
        if local:
            return local_pool.LocalPool(maker)
        from workers.cluster.pool import RayPool  # imports Ray, without which a local run starts sooner

        return RayPool(maker, job.workers, units, tell)

    try:
        run_job(job, make_pool, threading.Event(), functools.partial(open_display, interval_s=5.0))
    except TwoTowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    job, logs, number, turn_s, *flags = sys.argv[1:]
    chosen = Flags(Path(flags[0])) if flags else None
    return drive(Path(job), Path(logs), int(number), float(turn_s), local=False, flags=chosen)


if __name__ == "__main__":
    sys.exit(main())
