"""Tests a small run of the simulated driver of `make bench-pipeline`, and the figures that it writes."""

import gc

import pytest

from tests.benchmarks.pipeline_dispatcher import run_simulated
from tests.benchmarks.pipeline_results import Compared, Dispatched, Overhead, figures

pytestmark = pytest.mark.slow
REPLICAS, UNITS = 64, 1_000


def simulated(*, longest_first: bool) -> Dispatched:
    """Run a simulated job. Objects that earlier tests left in memory are frozen first: searching them for garbage would
    count as the driver's time."""
    gc.collect()
    gc.freeze()
    try:
        return run_simulated(UNITS, REPLICAS, longest_first=longest_first)
    finally:
        gc.unfreeze()


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[int, Dispatched]]:
    return {order: {UNITS: simulated(longest_first=order == "longest_first")} for order in ("longest_first", "arrival")}


def test_the_driver_keeps_up_with_the_replicas(runs: dict[str, dict[int, Dispatched]]) -> None:
    """The driver hands out 100 units a second with little processor time. Processor time is measured, so that other
    processes do not count. The bounds are the aims of `make bench-pipeline`."""
    run = runs["longest_first"][UNITS]
    assert run.driver_share < 0.2
    assert run.driver_ms_a_unit < 2
    assert 0 < run.handover_ms_p50 <= run.handover_ms_p99 < 10


def test_units_longest_first_end_the_job_evenly(runs: dict[str, dict[int, Dispatched]]) -> None:
    """Units handed out longest first let the replicas end together; with unknown work, replicas idle at the end. Both
    runs have the same units with the same seconds."""
    assert 1 <= runs["longest_first"][UNITS].tail_ratio < 1.05 < runs["arrival"][UNITS].tail_ratio


def test_a_simulated_job_is_the_same_every_time(runs: dict[str, dict[int, Dispatched]]) -> None:
    """Two simulated jobs agree, except for the driver's own time, which shifts what follows."""
    again = simulated(longest_first=True)
    assert again.tail_ratio == pytest.approx(runs["longest_first"][UNITS].tail_ratio, rel=0.05)


def test_the_file_has_the_figures_that_were_asked_for(runs: dict[str, dict[int, Dispatched]]) -> None:
    compared = Compared(1000, (1.0, 3.0), (2.0, 4.0), 5.0)
    found = figures(runs, Overhead(0.02, 0.01), compared)
    asked = {"driver_ms_a_unit", "handover_ms_p99", "driver_rss_mb", "overhead_share", "vs_ray_data", "tail_ratio"}
    assert found.keys() == asked | {"details"}
    assert found["tail_ratio"].keys() == {"longest_first", "arrival"}
    assert found["vs_ray_data"] == 1.5
    assert found["details"]["ray"]["pipeline_rows_per_s"] == 500
