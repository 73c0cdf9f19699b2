"""Holds the results of the parts of `make bench-pipeline` and makes its output from them, without importing Ray."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The figures of a simulated job."""

    driver_ms_a_unit: float
    """Milliseconds of processor time of the dispatch loop per unit, including progress line and stall watch."""
    driver_share: float
    """Share of one core that the driver uses at the rate of units that the replicas reach."""
    handover_ms_p50: float
    handover_ms_p99: float
    """Percentiles of the milliseconds from the end of a unit to the assignment of the next one to its replica."""
    handover_ms_max: float
    tail_ratio: float
    """Wall clock divided by the wall clock with all replicas busy to the end."""
    units_per_s: float
    rss_mb: float
    """Peak resident memory of the process, in 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Shares of a replica's time in which no step of the engine runs, from the loaded model to the last published part.
    During this time the replica reads the first unit, submits rows, turns completions into results, reports, and writes
    the last part."""

    wall: float
    """Share of the wall clock, which includes waiting and the time of other processes."""
    processor: float
    """Share of the processor time of the replica's thread."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The wall clock of whole jobs in seconds, in the order in which they ran."""

    rows: int
    pipeline: tuple[float, ...]
    ray_data: tuple[float, ...]
    driver_ms_a_unit: float
    """Milliseconds of processor time of the pipeline's driver on Ray per unit, including planning and manifest."""

    @property
    def ratio(self) -> float:
        """Rows per second of the pipeline divided by those of Ray Data."""
        return sum(self.ray_data) / sum(self.pipeline)

    def rows_per_s(self, seconds: tuple[float, ...]) -> float:
        """Return the rows per second over all runs together."""
        return self.rows * len(seconds) / sum(seconds)


def figures(runs: Mapping[str, Mapping[int, Dispatched]], overhead: Overhead, compared: Compared) -> dict[str, Any]:
    """Return the content of pipeline.json. `runs`: by order and number of units, the whole job first."""
    whole = next(iter(runs["longest_first"].values()))
    return {
        "driver_ms_a_unit": whole.driver_ms_a_unit,
        "handover_ms_p99": whole.handover_ms_p99,
        "driver_rss_mb": whole.rss_mb,
        "overhead_share": overhead.wall,
        "vs_ray_data": compared.ratio,
        "tail_ratio": {order: next(iter(found.values())).tail_ratio for order, found in runs.items()},
        "details": {
            "dispatcher": {
                order: {units: asdict(run) for units, run in found.items()} for order, found in runs.items()
            },
            "overhead_share_of_processor_time": overhead.processor,
            "ray": asdict(compared)
            | {
                "pipeline_rows_per_s": compared.rows_per_s(compared.pipeline),
                "ray_data_rows_per_s": compared.rows_per_s(compared.ray_data),
            },
        },
    }
