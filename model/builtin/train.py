"""Trains builtin:tiny: `python -m model.builtin.train`; the same command continues a stopped run. See --help.

It trains first the tokenizer, then the context tower with next-token loss, then, with the context tower frozen, the
denoiser. The denoiser starts as a copy of the context tower with time conditioning and learns to fill masked blocks
(masked diffusion with a linear schedule; the loss is on masked positions, without the 1/t weight). All randomness
depends on SEED and the step number alone.
"""

import argparse
import itertools
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from model.builtin import trainable
from model.builtin.bpe import MASK, train_tokenizer
from model.builtin.corpus import Batch, Corpus
from model.builtin.parameters import Weights, checkpoint_names, fresh_weights, with_time
from model.builtin.phase import Loss, Phase, run_phase
from model.builtin.recipe import CONFIG, PHASES, SEED, VOCAB_SIZE
from model.builtin.tasks import examples
from model.builtin.trainable import CHUNK, Blocks, Layout
from model.checkpoint.config import TwoTowerConfig
from model.checkpoint.reader import BUILTIN
from model.checkpoint.writer import write_checkpoint

TOKENIZER_EXAMPLES = 20_000
AFTER_END_WEIGHT = 0.2
"""Weight in the denoiser's loss of the positions after the end of text, which are never part of a completion."""


def context_loss(config: TwoTowerConfig, weights: Weights, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next-token loss, the share of right answer tokens, and the loads of the experts; see Loss.

    Tokens of prompts have the weight PROMPT_WEIGHT in the loss, but do not count in the share.
    """
    loads: list[Tensor] = []
    hidden, _ = trainable.context(config, weights, batch["ids"], Layout(batch["document"], batch["real"]), loads)
    logits = F.linear(hidden[:, :-1], weights["head"]).flatten(0, 1).float()
    target, weight = batch["ids"][:, 1:].flatten(), batch["weight"][:, :-1].flatten()
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    answers = weight == 1
    right = ((logits.argmax(-1) == target) & answers).sum() / answers.sum()
    return loss, right, torch.stack(loads)


def denoiser_loss(
    config: TwoTowerConfig, frozen: Weights, weights: Weights, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss on masked positions, the share of right ones among them, and the loads of the experts; see Loss.

    `frozen` are the weights of the context tower, `weights` those of the denoiser. The share does not count positions
    after the end of text.
    """
    loads: list[Tensor] = []
    layout = Layout(batch["document"], batch["real"])
    with torch.no_grad():
        _, seeds = trainable.context(config, frozen, batch["ids"], layout, [])
    chunk, masked = batch["chunk"], batch["masked"]
    rows = torch.arange(len(chunk), device=chunk.device)[:, None]
    target = batch["ids"].unflatten(1, (-1, CHUNK))[rows, chunk]  # (B, K, Q)
    live = batch["live"].unflatten(1, (-1, CHUNK))[rows, chunk]
    blocks = Blocks(chunk, batch["t"])
    hidden = trainable.denoiser(config, weights, target.masked_fill(masked, MASK), blocks, seeds, layout, loads)
    logits = F.linear(hidden, weights["head"]).float()
    weight = masked * torch.where(live, 1.0, AFTER_END_WEIGHT)
    losses = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
    loss = (losses * weight.flatten()).sum() / weight.sum()
    asked = masked & live
    right = ((logits.argmax(-1) == target) & asked).sum() / asked.sum()
    return loss, right, torch.stack(loads)


def main() -> None:
    """Read the options and train, in one process on a GPU or in `--processes` processes on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m model.builtin.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILTIN["tiny"], help="folder for the checkpoint")
    parser.add_argument(
        "--work", type=Path, default=Path("out/tiny"), help="folder in which a run in progress is saved"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="number of processes if there is no GPU, of one thread each; they share the rows of a step",
    )
    options = parser.parse_args()
    options.processes = 1 if torch.cuda.is_available() else options.processes
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_train, (options, f"file://{meeting}/point"), nprocs=options.processes)


def _train(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Train all phases in the process with number `rank`. The first process, 0, writes the checkpoint."""
    torch.set_flush_denormal(True)  # states that have decayed become denormal numbers, which are slow
    torch.set_num_threads(1)  # the operations are too small to be split among threads
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TwoTowerConfig.from_dict(CONFIG)
    texts = (e.prompt + e.answer for e in itertools.islice(examples(SEED, held_out=False), TOKENIZER_EXAMPLES))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)

    def run(name: str, start: Weights, loss: Loss) -> Weights:
        recipe = PHASES[name]
        phase = Phase(name, recipe, start, options.work, device)
        run_phase(phase, Corpus(tokenizer, recipe.seed, recipe.shares), loss)
        return phase.average

    first = partial(context_loss, config)
    context = run("context_polish", run("context", fresh_weights(config, SEED), first), first)
    frozen = {name: value.to(torch.bfloat16).float() for name, value in context.items()}  # rounded as in the checkpoint
    loss = partial(denoiser_loss, config, frozen)
    denoiser = run("denoiser_polish", run("denoiser", with_time(config, frozen, SEED), loss), loss)

    if rank:
        return
    tensors = checkpoint_names(frozen, "context_tower", "context_lm_head")
    tensors |= checkpoint_names(denoiser, "denoiser_tower", "lm_head")
    write_checkpoint(options.out, CONFIG, json.loads(tokenizer.to_str()), tensors)


if __name__ == "__main__":
    main()
