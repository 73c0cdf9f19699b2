"""`make bench-gpu`: measures forwards against their floors, tokens per second, loading, and stages on one device.

The weights are random, of the released shape (`--size released`), of about a billion parameters (`mid`), of the shape
of builtin:tiny (`tiny`) or of builtin:noise (`noise`, which a CPU can run). Writes gpu.json, gpu.md (tables for
RESULTS.md) and gpu.svg into one folder. `--only` leaves the other measurements out, if time on a GPU is short.
tests/benchmarks/gpu/RESULTS.md holds figures that were measured on a GPU.
"""

import argparse
import gc
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model.builtin.noise import CONFIG as NOISE
from model.checkpoint.released import RELEASED
from model.errors import RequestError
from model.network.random_weights import random_pair
from tests.benchmarks.gpu.ceilings import ceilings
from tests.benchmarks.gpu.forwards import KINDS, Bench
from tests.benchmarks.gpu.loading import load_rates
from tests.benchmarks.gpu.random_model import SIZES
from tests.benchmarks.gpu.report import draw, markdown
from tests.benchmarks.gpu.throughput import Rate, lockstep_rate, rate, two_stages

OUT = Path(__file__).parents[1] / "out" / "gpu.json"
WHAT = ("forwards", "throughput", "load", "stages")
# one layer of each kind in both towers, 7.0 GB
LOADED = {**RELEASED, "hybrid_override_pattern": "M*E", "num_hidden_layers": 3, "vocab_size": 32768}
SMALL_HEAD = 32768
"""Vocabulary size of the model on two stages, whose weights are created three times."""


def main() -> None:
    """Run the benchmark."""
    options = _options()
    device = torch.device(options.device)
    if device.type == "cpu" and options.size != "noise":
        raise SystemExit("error: on a CPU run --size noise; the others need a GPU")
    torch.set_num_threads(1)  # a GPU needs no more, and a CPU only checks that the benchmark runs
    found: dict[str, Any] = {"command": f"python -m tests.benchmarks.gpu {' '.join(sys.argv[1:])}".strip()}
    found |= {"machine": _machine(device), "size": options.size, "left_out": []}
    if {"forwards", "throughput"} & set(options.only):
        _with_one_model(options, device, found)
    _free(device)
    if "load" in options.only:
        raw = NOISE if options.size == "noise" else LOADED
        found["load"] = load_rates(raw, device, options.folder)
        if found["load"] is None:
            found["left_out"].append("load: the disk has too little room; --folder names another")
    if "stages" in options.only:
        config = SIZES[options.size]
        config = replace(config, vocab_size=min(SMALL_HEAD, config.vocab_size))
        found["stages"] = two_stages(config, device, options.stage_rows, prompt=options.prompt, new=options.new)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(found))
    if found.get("throughput"):
        draw(found["throughput"], options.out.with_suffix(".svg"))
    Console(width=120).print(markdown(found), markup=False, highlight=False)


def _with_one_model(options: argparse.Namespace, device: torch.device, found: dict[str, Any]) -> None:
    """Measure single forwards and the engine's throughput with the same model."""
    pair = random_pair(SIZES[options.size], torch.bfloat16, [device])
    if "forwards" in options.only:
        hardware = ceilings(device)
        found["ceilings"] = {"copy_bytes_per_s": hardware.bandwidth, "bf16_flops": hardware.flops}
        found["forwards"] = [
            asdict(timing) | {"over_floor": timing.over_floor}
            for context in options.contexts
            for rows in options.rows
            for timing in map(Bench(pair, hardware, rows, context).time, KINDS)
        ]
    if "throughput" in options.only:
        length = {"prompt": options.prompt, "new": options.new}
        rates: list[Rate] = []
        for rows in options.throughput_rows:
            try:
                rates.append(rate(pair, rows, "ar", 0, **length))
                rates += [rate(pair, rows, "diffusion", steps, **length) for steps in options.steps]
                rates += [lockstep_rate(pair, rows, steps, **length) for steps in options.steps]
            except RequestError as error:  # the memory does not hold so many rows
                found["left_out"].append(f"throughput at {rows} rows: {error}")
            _free(device)
        found["throughput"] = [asdict(one) for one in rates]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="released")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=_some, default=list(WHAT), metavar="WHAT,WHAT", help=f"of {', '.join(WHAT)}")
    parser.add_argument("--rows", type=_numbers, default=[1, 4, 16, 64, 128], metavar="N,N")
    parser.add_argument("--contexts", type=_numbers, default=[512, 4096], metavar="N,N")
    parser.add_argument("--throughput-rows", type=_numbers, default=[1, 4, 16, 64, 128, 256, 384], metavar="N,N")
    parser.add_argument("--steps", type=_numbers, default=[5, 9], metavar="N,N")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--stage-rows", type=int, default=64, help="rows of the engine on two stages")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint that is loaded: a local disk")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _some(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(WHAT):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there is {', '.join(WHAT)}")
    return text.split(",")


def _machine(device: torch.device) -> dict[str, str]:
    cuda = device.type == "cuda"
    found = {"device": torch.cuda.get_device_name(device) if cuda else platform.machine(), "torch": torch.__version__}
    if cuda:
        import triton

        found |= {"CUDA": str(torch.version.cuda), "Triton": triton.__version__}
    return found | {"Python": platform.python_version(), "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
