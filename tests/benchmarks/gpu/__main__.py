"""`make bench-gpu`: forwards over their floors and tokens a second on one device, as tests/benchmarks/out/gpu.json.

Random weights of the released shape (`--size released`), of about a billion (`mid`) or of builtin:noise (`noise`, which
a CPU can run). Figures that were taken on a GPU stand in tests/benchmarks/gpu/RESULTS.md.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.gpu.ceilings import ceilings
from tests.benchmarks.gpu.forwards import KINDS, Bench, Timing
from tests.benchmarks.gpu.random_model import SIZES, random_pair
from tests.benchmarks.gpu.throughput import Rate, lockstep_rate, rate

OUT = Path(__file__).parents[1] / "out" / "gpu.json"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="released")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=_numbers, default=[1, 4, 16, 64, 128], metavar="N,N")
    parser.add_argument("--contexts", type=_numbers, default=[512, 4096], metavar="N,N")
    parser.add_argument("--throughput-rows", type=_numbers, default=[1, 16, 128, 384], metavar="N,N")
    parser.add_argument("--steps", type=_numbers, default=[5, 9], metavar="N,N")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and options.size != "noise":
        raise SystemExit("error: on a CPU run --size noise; the others need a GPU")
    torch.set_num_threads(1)  # of no use to a GPU, and a CPU runs this only to see that it runs
    console = Console(width=110)
    hardware = ceilings(device)
    pair = random_pair(SIZES[options.size], torch.bfloat16, device)
    found: dict[str, Any] = {"machine": _machine(device), "size": options.size}
    found["ceilings"] = {"copy_bytes_per_s": hardware.bandwidth, "bf16_flops": hardware.flops}
    timings = [
        Bench(pair, hardware, rows, context).time(kind)
        for context in options.contexts
        for rows in options.rows
        for kind in KINDS
    ]
    found["forwards"] = [asdict(timing) | {"over_floor": timing.over_floor} for timing in timings]
    console.print(_forwards_table(timings))
    length = {"prompt": options.prompt, "new": options.new}
    rates: list[Rate] = []
    for rows in options.throughput_rows:
        rates.append(rate(pair, rows, "ar", 0, **length))
        rates += [rate(pair, rows, "diffusion", steps, **length) for steps in options.steps]
        rates += [lockstep_rate(pair, rows, steps, **length) for steps in options.steps]
    found["throughput"] = [asdict(one) for one in rates]
    console.print(_rates_table(rates))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{options.out}: {hardware.bandwidth / 1e12:.2f} TB/s copied, {hardware.flops / 1e12:.0f} TFLOP/s")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _forwards_table(timings: list[Timing]) -> Table:
    table = Table("forward", "context", "rows", "ms", "floor ms", "over floor")
    for t in timings:
        cells = (f"{t.context:,}", str(t.rows), f"{t.ms:.2f}", f"{t.floor_ms:.2f}", f"{t.over_floor:.2f}")
        table.add_row(t.kind, *cells)
    return table


def _rates_table(rates: list[Rate]) -> Table:
    table = Table("mode", "rows", "tokens/s", "device idle")
    for r in rates:
        idle = "-" if r.host_share is None else f"{r.host_share:.1%}"
        table.add_row(r.what, str(r.rows), f"{r.tokens_per_s:,.0f}", idle)
    return table


if __name__ == "__main__":
    main()
