"""What the parts of `make bench-pipeline` find, and the file that is made of it. Free of Ray."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A simulated job."""

    driver_ms_a_unit: float
    """Processor time of the dispatch loop, progress line and stall watch included."""
    driver_share: float
    """Of a core, at the rate of units that the replicas reach."""
    handover_ms_p50: float
    handover_ms_p99: float
    """From the end of a unit to the assignment of the next one to its replica."""
    handover_ms_max: float
    tail_ratio: float
    """Wall clock over what it would be with all replicas busy to the end."""
    units_per_s: float
    rss_mb: float
    """Peak resident memory of the process, in 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Shares of a replica's time, from the loaded model to the last published part, in which no step of the engine
    runs: reading the first unit, submitting rows, turning completions into results, reports, the last part."""

    wall: float
    """Of the wall clock: waiting counts, and so do neighbours on the machine."""
    processor: float
    """Of the processor time of the replica's thread."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Wall clock of whole jobs, in seconds, in the order in which they ran."""

    rows: int
    pipeline: tuple[float, ...]
    ray_data: tuple[float, ...]
    driver_ms_a_unit: float
    """Processor time of the pipeline's driver on Ray, planning and manifest included."""

    @property
    def ratio(self) -> float:
        """Rows a second over Ray Data's."""
        return sum(self.ray_data) / sum(self.pipeline)

    def rows_per_s(self, seconds: tuple[float, ...]) -> float:
        """Of the runs together."""
        return self.rows * len(seconds) / sum(seconds)


def figures(runs: Mapping[str, Mapping[int, Dispatched]], overhead: Overhead, compared: Compared) -> dict[str, Any]:
    """The figures as pipeline.json has them; runs: by order and number of units, the whole job first."""
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
