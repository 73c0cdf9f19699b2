"""`make quality`: measures the quality of builtin:tiny.

Writes tests/benchmarks/out/quality.json and the plot of docs/quality.md, and prints a table. The prompts are held out
from training; decoding is greedy, in float32, on one thread. It measures AR, diffusion with blocks of 16 over several
thresholds and steps, and diffusion with blocks of 32 and 64, which the denoiser was not trained on. `--checkpoint`
measures another checkpoint, `--rows` fewer prompts.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from model import GenerationParams, load_model
from model.builtin.corpus import held_out_examples
from model.checkpoint.reader import open_checkpoint
from tests.benchmarks.quality.measure import MAX_NEW_TOKENS, Score, generate, score
from tests.benchmarks.quality.plot import draw

OUT = Path(__file__).parents[1] / "out" / "quality.json"
CURVE = Path(__file__).parent / "curve.svg"
SEED, ROWS = 1, 1024
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
POINTS = (
    *((threshold, 16, 16) for threshold in THRESHOLDS),
    *((0.99, 16, steps) for steps in (1, 2, 4)),
    *((0.8, size, size) for size in (32, 64)),
)
"""The settings of diffusion that are measured: (threshold, block size, maximum steps per block)."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality")
    parser.add_argument("--checkpoint", default="builtin:tiny")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_model(options.checkpoint)
    content = open_checkpoint(options.checkpoint).tokenizer_json()
    if content is None:
        raise SystemExit(f"error: {options.checkpoint} has no tokenizer")
    examples = held_out_examples(Tokenizer.from_buffer(content), SEED, options.rows)

    def run(**settings: Any) -> Any:
        return generate(
            pair, examples, GenerationParams(max_new_tokens=MAX_NEW_TOKENS, eos_ids=pair.eos_ids, **settings)
        )

    console = Console(width=120)
    ar = run(mode="ar")
    point = score(examples, ar, ar)
    found: dict[str, Any] = {"rows": len(examples), "ar": asdict(point)}
    _show(console, "AR", point)
    found["diffusion"] = []
    for threshold, size, steps in POINTS:
        done = run(confidence_threshold=threshold, block_size=size, steps_per_block=steps)
        point = score(examples, done, ar)
        found["diffusion"].append({"threshold": threshold, "block_size": size, "steps": steps, **asdict(point)})
        _show(console, f"threshold {threshold:g}, block {size}, {steps} steps", point)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(_by_task(found))
    if options.checkpoint == "builtin:tiny" and options.rows == ROWS:
        draw(found["ar"]["exact_match"], found["diffusion"], CURVE)


def _show(console: Console, name: str, point: Score) -> None:
    rate = f"{point.tokens_per_forward:.2f}" if point.tokens_per_forward else "-"
    console.print(
        f"{name}: exact {point.exact_match:.1%}, as AR {point.agreement_with_ar:.1%}, {rate} tokens a forward, "
        f"degenerate {point.degenerate:.1%}, blocks by steps {point.blocks_by_steps}"
    )


def _by_task(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['rows']} held-out prompts: exact match, tokens a forward")
    shown = {"AR": found["ar"]} | {
        f"{p['threshold']:g}": p for p in found["diffusion"] if p["block_size"] == 16 and p["steps"] == 16
    }
    for column in ("task", *shown):
        table.add_column(column)
    for task in found["ar"]["tasks"]:
        cells = (p["tasks"][task] for p in shown.values())
        table.add_row(task, *(f"{right:.1%}" + (f" {rate:.2f}" if rate else "") for right, rate in cells))
    return table


if __name__ == "__main__":
    main()
