"""`python -m tests.benchmarks.sick_slot [SECONDS]`: measures what a sick replica slot costs the healthy one.

One job runs on a real Ray cluster, with the chaos suite's engine, whose turns take a fixed time. First it runs with one
replica. Then it runs with two, and every process in slot r1 dies at its first forward. From the third such death on,
the rows that r0 finishes are counted for SECONDS (default: 180). Prints both rates, their ratio, the number of deaths
and the number of error rows.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from tests.chaos.harness import HEALTH, NODE_CONFIG
from tests.chaos.logs import Life, read_lives
from tests.chaos.sabotage import SICK
from tests.chaos.scenarios.trial import Place, Trial
from tests.clusters import start_patiently

ROWS, FILES, TURN_S = 40_000, 8, 0.1
ALONE_S = 60.0
"""The seconds for which the replica is measured alone."""
THIRD = 3
LIMIT_S = 240.0
"""The seconds within which the first rows, and the third death, must have happened."""


def main(seconds: float) -> None:
    """Measure and print both runs."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="twotower-sick-slot-") as folder:
        head = {"num_cpus": 4, "_system_config": HEALTH, **NODE_CONFIG}
        cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            alone = measure(Path(folder) / "alone", cluster.address, ALONE_S, sick=False)
            beside = measure(Path(folder) / "sick", cluster.address, seconds, sick=True)
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]
    print(f"one replica: {alone:.2f} rows/s; beside a sick slot: {beside:.2f} rows/s, {beside / alone:.1%} of it")


def measure(folder: Path, address: str, seconds: float, *, sick: bool) -> float:
    """Return the rows/s of r0 in a run of the job, and print what happened meanwhile."""
    trial = Trial.of(Place(folder, seed=0, address=address), "sick slot", ROWS, FILES)
    trial.turn_s = TURN_S
    trial.job["workers"]["replicas"] = 1 + sick
    trial.job["output"]["rows_per_file"] = 500
    if sick:
        trial.flags.set(SICK, slot="r1", how="exit")
    driver = trial.submit()
    try:
        began = wait_for(trial, lambda lives: third_death(lives) if sick else first_end(lives)) + 5.0
        time.sleep(max(0.0, began + seconds - time.time()) + 1.0)
        assert driver.poll() is None, f"the run ended too early: {driver.tail()}"
        lives = read_lives(trial.logs)
    finally:
        trial.close()
    rows = rows_between(trial.logs, began, began + seconds)
    errors = sum(reason == "error" for part in trial.parts() for reason in reasons(part))
    died = sum(life.slot == "r1" for life in lives)
    print(f"  {'sick' if sick else 'alone'}: {rows:,} rows in {seconds:g} s, {died} lives of r1, {errors} error rows")
    return rows / seconds


def wait_for(trial: Trial, moment: Callable[[list[Life]], float | None]) -> float:
    """Wait until `moment` finds a time in the replicas' logs, and return it."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := moment(read_lives(trial.logs)):
            return found
        time.sleep(0.2)
    raise SystemExit(f"nothing happened within {LIMIT_S:g} s: {trial.runs[-1].tail()}")


def first_end(lives: list[Life]) -> float | None:
    """Return when the first row ended."""
    return min((end for life in lives for end in life.ends), default=None)


def third_death(lives: list[Life]) -> float | None:
    """Return when the third process of r1 started, which dies at once."""
    starts = [life.started for life in lives if life.slot == "r1"]
    return starts[THIRD - 1] if len(starts) >= THIRD else None


def rows_between(logs: Path, first: float, last: float) -> int:
    """Return how many rows r0 finished in this time."""
    lines = [line.split() for path in logs.glob("*_r0*_*") for line in path.read_text().split("\n")[1:-1]]
    return sum(len(keys) for at, _, *keys in lines if first <= float(at) < last)


def reasons(part: Path) -> list[str]:
    """Return the finish reasons of a part, without those of rows that are bad for any engine."""
    table = pq.read_table(part, columns=["finish_reason", "error"]).to_pylist()
    return [row["finish_reason"] for row in table if "replica died" in str(row["error"])]


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 180.0)
