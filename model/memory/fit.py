"""Calculates how many rows, and how many tokens of context, fit on given GPUs. Needs neither the GPUs nor the weights.

Examples, with both towers of the released model on one GPU of 139 GiB and on two GPUs of 80 GiB:

python -m model.memory.fit --devices 139
python -m model.memory.fit --devices 80,80 --max-rows 384 --context 4096
"""

import argparse
from collections.abc import Sequence

import torch

from model.checkpoint.config import Towers, TwoTowerConfig
from model.checkpoint.reader import open_checkpoint
from model.checkpoint.released import RELEASED_CONFIG
from model.errors import RequestError, TwoTowerError
from model.memory.plan import MemoryPlan
from model.memory.planner import Planner
from model.network.two_tower import DTYPES, Stage, TwoTower
from model.requests import EngineLimits

GIB = 1 << 30


def plan_for(
    config: TwoTowerConfig, dtype: torch.dtype, totals: Sequence[int], limits: EngineLimits, towers: Towers = "both"
) -> MemoryPlan:
    """Return the memory plan for GPUs with one stage each. totals: bytes of memory of each GPU.

    Raises RequestError if the weights or the limits do not fit, or if there are more GPUs than layers.
    """
    names = [f"cuda:{i}" for i in range(len(totals))]
    weights, stages = stage_weights(config, dtype, names, towers)
    for name, need, total in zip(names, weights, totals, strict=True):
        if need >= total:
            raise RequestError(
                f"{name} has {total / GIB:.1f} GiB, but its share of the weights takes {need / GIB:.1f} GiB: name more "
                "devices, or larger ones"
            )
    free = {name: total - need for name, need, total in zip(names, weights, totals, strict=True)}
    return Planner(config, dtype, stages, dict(zip(names, weights, strict=True)), free, limits).plan()


def stage_weights(
    config: TwoTowerConfig, dtype: torch.dtype, devices: Sequence[str], towers: Towers = "both"
) -> tuple[list[int], list[Stage]]:
    """Return the bytes of each stage's weights (with its buffers and its table of time conditioning), and the stages.
    They are those of a loaded model, but no weights are loaded.

    devices: one name per stage; the devices need not exist. Raises RequestError if there are more stages than layers.
    """
    pair = TwoTower(config, dtype, [torch.device("meta")] * len(devices), towers)
    first, last = [pair.context.embeddings], [pair.context.norm_f, pair.context.head]
    if pair.denoiser is not None:
        first.append(pair.denoiser.embeddings)
        last += [pair.denoiser.norm_f, pair.denoiser.head]
    weights, stages = [], []
    for i, stage in enumerate(pair.stages):
        modules = [pair.context.layers[layer] for layer in stage.context]
        modules += first if i == 0 else []
        modules += last if i == len(devices) - 1 else []
        held = 0
        if pair.denoiser is not None:
            modules += [pair.denoiser.layers[layer] for layer in stage.denoiser]
            modules.append(pair.times[i])
            held = pair.tables[i].nbytes
        for module in modules:
            held += sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        weights.append(held)
        stages.append(Stage(torch.device(devices[i]), stage.context, stage.denoiser))
    return weights, stages


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan that the arguments ask for; if they are None, the command line's. Raises SystemExit with the
    reason if an argument is wrong, the checkpoint cannot be read, or nothing fits."""
    parser = argparse.ArgumentParser(
        prog="python -m model.memory.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", required=True, metavar="GIB,GIB", help="memory of each GPU of a replica, in GiB")
    parser.add_argument("--max-rows", default="auto", metavar="N|auto", help="rows generated together at most")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="tokens of one row at most, prompt + completion")
    parser.add_argument(
        "--prefill",
        type=int,
        default=EngineLimits().max_prefill_tokens,
        metavar="TOKENS",
        help="prompt tokens of one forward at most",
    )
    parser.add_argument("--checkpoint", help="folder or URL whose config.json is used; default: the released model's")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="number format of the weights")
    parser.add_argument("--towers", choices=("both", "context"), default="both", help="context: enough for AR mode")
    options = parser.parse_args(arguments)
    try:
        totals = [int(float(part) * GIB) for part in options.devices.split(",")]
        rows = "auto" if options.max_rows == "auto" else int(options.max_rows)
    except ValueError as error:
        parser.error(str(error))
    try:
        config = RELEASED_CONFIG if options.checkpoint is None else open_checkpoint(options.checkpoint).config
        limits = EngineLimits(
            max_rows=rows,  # type: ignore[arg-type]  # "auto" or a number
            max_context_tokens=options.context,
            max_prefill_tokens=options.prefill,
        )
        plan = plan_for(config, DTYPES[options.dtype], totals, limits, options.towers)
    except TwoTowerError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(plan.lines()))


if __name__ == "__main__":
    main()
