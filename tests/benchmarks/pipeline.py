"""`make bench-pipeline`: measures what the pipeline costs in addition to the model.

Prints a table and writes tests/benchmarks/out/pipeline.json:

    driver_ms_a_unit, handover_ms_p99, driver_rss_mb    256 simulated replicas and 50,000 units through the dispatcher
    tail_ratio          wall clock of that job over its wall clock with all replicas busy to the end, with units longest
                        first and as they come; `details` has it for jobs of fewer units
    overhead_share      share of a replica's time outside the engine: jobs/demo.yaml in one process
    vs_ray_data         rows per second over those of Ray Data: 200,000 rows, an engine that computes nothing

Each part runs in a process of its own. `--quick` runs a small version of each part and writes no file.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tests.benchmarks.pipeline_dispatcher import REPLICAS, UNITS, UNITS_PER_S, run_simulated
from tests.benchmarks.pipeline_results import Dispatched, figures

OUT = Path(__file__).parent / "out" / "pipeline.json"
TAILS = (1_000, 5_000)
"""Units of smaller jobs, in which the end is a larger share of the whole."""
QUICK = 20
"""Factor by which a quick run is smaller."""
T = TypeVar("T")


def alone(run: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call `run` in a new process and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *arguments, **options).result()


def measure(folder: Path, *, scale: int, console: Console) -> dict[str, Any]:
    """Run all parts and return the content of pipeline.json."""
    # Imported late: every process imports this file, and these modules would add to the simulated driver's memory.
    from tests.benchmarks.pipeline_overhead import measure_overhead
    from tests.benchmarks.pipeline_ray_data import ROWS, compare

    sizes = (UNITS // scale, *TAILS)
    runs: dict[str, dict[int, Dispatched]] = {"longest_first": {}, "arrival": {}}
    for order, found in runs.items():
        for units in sizes:
            console.print(f"{REPLICAS} simulated replicas, {units:,} units, {order} ...")
            found[units] = alone(run_simulated, units, REPLICAS, longest_first=order == "longest_first")
    console.print("jobs/demo.yaml in one process ...")
    overhead = alone(measure_overhead, folder)
    console.print(f"{ROWS // scale:,} rows, pipeline and Ray Data in turns ...")
    compared = alone(compare, folder, ROWS // scale)
    return figures(runs, overhead, compared)


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table("what", "figure", "aim", "beside it", title="pipeline", title_justify="left")
    dispatcher, ray = found["details"]["dispatcher"], found["details"]["ray"]
    units, whole = next(iter(dispatcher["longest_first"].items()))
    at = f"{whole['driver_share']:.1%} of a core at {whole['units_per_s']:.0f} units/s"
    table.add_row("driver, a unit", f"{found['driver_ms_a_unit']:.2f} ms", f"{200 / UNITS_PER_S:.0f} ms", at)
    middle = f"median {whole['handover_ms_p50']:.2f} ms, longest {whole['handover_ms_max']:.2f} ms"
    table.add_row("freed replica to next unit, p99", f"{found['handover_ms_p99']:.2f} ms", "10 ms", middle)
    table.add_row("driver, memory", f"{found['driver_rss_mb']:.0f} MB", "", f"{REPLICAS} replicas, {units:,} units")
    for count, run in dispatcher["longest_first"].items():
        arrival = f"{dispatcher['arrival'][count]['tail_ratio']:.3f} as they come"
        table.add_row(f"tail, {count:,} units", f"{run['tail_ratio']:.3f}", "", arrival)
    processor = f"{found['details']['overhead_share_of_processor_time']:.1%} of processor time"
    table.add_row("replica outside the engine", f"{found['overhead_share']:.1%}", "3%", processor)
    rates = f"{ray['pipeline_rows_per_s']:,.0f} to {ray['ray_data_rows_per_s']:,.0f} rows/s"
    table.add_row("rows/s over Ray Data's", f"{found['vs_ray_data']:.2f} x", "1 x", rates)
    table.add_row("driver on Ray, a unit", f"{ray['driver_ms_a_unit']:.0f} ms", "", "of 10,000 rows, plan to manifest")
    console.print(table)


def main() -> None:
    console, began = Console(width=None if sys.stdout.isatty() else 120), time.perf_counter()
    quick = "--quick" in sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="twotower-bench-"))
    try:
        found = measure(folder, scale=QUICK if quick else 1, console=console)
    finally:
        shutil.rmtree(folder)
    show(found, console)
    if not quick:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"{OUT.name} written after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
