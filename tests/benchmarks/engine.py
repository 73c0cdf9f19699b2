"""`make bench`: measures what the engine's design gains; writes tests/benchmarks/out/engine.json and prints a table.

    vs_lockstep            tokens/s of the engine over those of static batches in lockstep, by rows (builtin:noise, CPU)
    padding                share of padding in prefill forwards, 2,000 log-normal prompts, sorted and as they arrive
    prefix_speedup         time of 64 rows with a template of 1,000 tokens: computed for each row over computed once
    scheduler_ms_256_rows  host time of one turn of the loop with 256 rows, if forwards take no time
    modes                  tokens/s of the three modes at 16 rows (builtin:noise, CPU)
    simulated              100,000 requests at 256 rows on two H100s by a roofline, in three layouts

Torch runs on one thread. The rows have different thresholds (workload.THRESHOLDS), so their steps per block differ.
`--quick` makes everything small, to check that it runs; its figures mean nothing.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model import load_model
from model.network.two_tower import TwoTower
from tests.benchmarks.cost_model import Layers, Steps, Towers
from tests.benchmarks.host import host_ms
from tests.benchmarks.measure import Comparison, bfloat16_differences, mode_rates, prefix_speedup, vs_lockstep
from tests.benchmarks.roofline import Hardware, Roofline, released
from tests.benchmarks.simulate import Mix, Simulated, lockstep, padding_share, replay, turn_ms
from tests.model.golden_cases import CHECKPOINT

OUT = Path(__file__).parent / "out" / "engine.json"
ONE_THRESHOLD = 0.8
"""The published threshold, for a comparison in which all rows are equally hard."""
HOST_S = 1e-3
"""Seconds of host time for each forward in the simulation."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the measurements."""

    rounds: Mapping[int, int]
    """Number of rows -> rounds of the comparison with lockstep."""
    other_rounds: int = 3
    template: int = 1000
    turns: int = 3000
    bfloat16_rows: int = 128
    """Rows that are compared alone and among others, on each of the two small models."""
    prompts: int = 2000
    requests: int = 100_000
    """Requests simulated in each of the three layouts; each variant of the third layout gets a fifth of them."""


FULL = Sizes({1: 9, 8: 5, 32: 3})
QUICK = Sizes({1: 1, 8: 1}, 1, 128, 50, 4, 200, 1500)


def measure(sizes: Sizes, console: Console) -> dict[str, Any]:
    """Run all measurements and return the content of engine.json."""
    torch.set_num_threads(1)
    tiny = load_model("builtin:noise")
    found: dict[str, Any] = {}
    with console.status("engine against lockstep"):
        found |= _against_lockstep(tiny, sizes)
    steps = {int(k): v for k, v in found["details"]["steps_per_block"].items()}
    with console.status("padding, prefix, host, modes"):
        found["padding"] = {
            name: padding_share(sizes.prompts, sort=sort) for name, sort in (("sorted", True), ("arrival", False))
        }
        found["prefix_speedup"] = prefix_speedup(tiny, rounds=sizes.other_rounds, template=sizes.template)
        found["scheduler_ms_256_rows"], stand_in = turn_ms(256, Steps(steps), turns=sizes.turns)
        found["details"]["stand_in_ms_256_rows"] = stand_in
        found["details"]["engine_host_ms_256_rows"] = host_ms(tiny, 256, turns=sizes.turns // 10)
        found["modes"] = mode_rates(tiny, rounds=sizes.other_rounds)
        differ = {
            uri: bfloat16_differences(uri, count=sizes.bfloat16_rows) for uri in ("builtin:noise", str(CHECKPOINT))
        }
        found["details"]["bfloat16"] = {"rows": 2 * sizes.bfloat16_rows, "differ": sum(differ.values())}
    with console.status("simulated devices"):
        found |= _simulated(steps, sizes.requests)
    return found


def _against_lockstep(pair: TwoTower, sizes: Sizes) -> dict[str, Any]:
    runs = {rows: vs_lockstep(pair, rows, rounds=rounds) for rows, rounds in sizes.rounds.items()}
    most = max(runs)
    few = max(1, sizes.rounds[most] // 2)
    equal = {rows: vs_lockstep(pair, rows, rounds=few, lengths=(64,)) for rows in runs}
    even = vs_lockstep(pair, most, rounds=few, lengths=(64,), thresholds=(ONE_THRESHOLD,))
    return {
        "vs_lockstep": {str(rows): run.ratio for rows, run in runs.items()},
        "details": {
            "tokens_per_s": {str(rows): {"engine": r.engine, "lockstep": r.lockstep} for rows, r in runs.items()},
            "ratio_range": {str(rows): r.range for rows, r in runs.items()},
            "steps_per_block": {str(k): v for k, v in runs[most].steps.items()},
            "mean_steps_per_block": _mean(runs[most]),
            "equal_lengths_and_threshold": {
                "threshold": ONE_THRESHOLD,
                "rows": most,
                "ratio": even.ratio,
                "mean_steps": _mean(even),
            },
            "equal_lengths": {str(rows): run.ratio for rows, run in equal.items()},
        },
    }


def _mean(run: Comparison) -> float:
    return statistics.fmean(step for step, blocks in run.steps.items() for _ in range(blocks))


def _simulated(histogram: Mapping[int, int], requests: int) -> dict[str, Any]:
    roofline, mix, part = Roofline(released(), Hardware()), Mix.draw(requests), Mix.draw(requests // 5)
    layers = Layers(roofline)

    def steps() -> Steps:
        return Steps(histogram)  # new for each run, so that all runs draw the same steps

    runs = {
        "lockstep": lockstep(roofline, mix, steps()),
        "per_row_towers": replay(Towers(roofline), mix, steps(), host_s=HOST_S)[0],
        "per_row_layers": replay(layers, mix, steps(), host_s=HOST_S)[0],
    }
    variants = {
        f"layers_extend_every_{turns}": replay(layers, part, steps(), host_s=HOST_S, extend_every=turns)[0]
        for turns in (1, 2, 3)
    } | {f"layers_{lanes}_lanes": replay(layers, part, steps(), host_s=HOST_S, lanes=lanes)[0] for lanes in (1, 3)}
    return {"simulated": _rates(runs), "simulated_variants": _rates(variants)}


def _rates(runs: Mapping[str, Simulated]) -> dict[str, Any]:
    return {name: {"tokens_per_s": run.tokens_per_s, "busy": list(run.busy)} for name, run in runs.items()}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table("what", "figure", "beside it", title="engine", title_justify="left")
    details = found["details"]
    for rows, ratio in found["vs_lockstep"].items():
        rates, (low, high) = details["tokens_per_s"][rows], details["ratio_range"][rows]
        beside = f"{rates['engine']:,.0f} to {rates['lockstep']:,.0f} tokens/s; rounds {low:.2f} to {high:.2f}"
        table.add_row(f"against lockstep, {rows} rows", f"{ratio:.2f} x", beside)
    even = details["equal_lengths_and_threshold"]
    beside = f"{even['mean_steps']:.1f} steps a block, above {details['mean_steps_per_block']:.1f}"
    table.add_row(
        f"  and all rows at threshold {even['threshold']}, {even['rows']} rows", f"{even['ratio']:.2f} x", beside
    )
    for rows, ratio in details["equal_lengths"].items():
        table.add_row(f"  all completions of 64 tokens, {rows} rows", f"{ratio:.2f} x", "16 to 112 above")
    for name, share in found["padding"].items():
        table.add_row(f"padding in prefill, {name}", f"{share:.1%}", "")
    table.add_row("shared prefix of 1,000 tokens", f"{found['prefix_speedup']:.2f} x", "64 rows")
    host = f"{details['engine_host_ms_256_rows']:.2f} ms with the tables of blocks and pages"
    table.add_row("host, one turn of 256 rows", f"{found['scheduler_ms_256_rows']:.2f} ms", host)
    for mode, rate in found["modes"].items():
        table.add_row(f"{mode}, 16 rows", f"{rate:,.0f} tokens/s", "builtin:noise, one core")
    bf16 = details["bfloat16"]
    table.add_row("rows that differ among others in bfloat16", str(bf16["differ"]), f"of {bf16['rows']}")
    for name, run in (found["simulated"] | found["simulated_variants"]).items():
        busy = ", ".join(f"{share:.1%}" for share in run["busy"])
        table.add_row(f"simulated {name}", f"{run['tokens_per_s']:,.0f} tokens/s", f"devices busy {busy}")
    console.print(table)


def main() -> None:
    console, began = Console(width=None if sys.stdout.isatty() else 110), time.perf_counter()
    quick = "--quick" in sys.argv[1:]
    found = measure(QUICK if quick else FULL, console)
    show(found, console)
    if not quick:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"{OUT} written after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
