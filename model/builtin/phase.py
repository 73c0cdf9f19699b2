"""Runs one phase of the training: its optimizers, its steps, and its saved state."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.builtin.corpus import Batch, Corpus, mask_blocks
from model.builtin.optimizer import Muon
from model.builtin.parameters import Weights
from model.builtin.recipe import Recipe

SAVE_EVERY, LOG_EVERY = 100, 50  # steps between saves of the state, and between progress lines
BALANCE = 1e-2  # change of an expert's correction bias per step (arXiv 2408.15664)

Loss = Callable[[Weights, Batch], tuple[Tensor, Tensor, Tensor]]
"""A function that returns the loss, the share of right tokens, and the share of tokens that chose each expert of each
MoE layer (layers, E)."""


class Phase:
    """The state of one training phase: weights, their average, optimizers and step number.

    It is saved in `folder` regularly, and loaded from there if a stopped run has left it.
    """

    def __init__(self, name: str, recipe: Recipe, weights: Weights, folder: Path, device: torch.device) -> None:
        self.name, self.recipe, self.device = name, recipe, device
        self.file = folder / f"{name}.safetensors"
        weights = {key: value.to(device) for key, value in weights.items()}
        self.step = 0
        self.weights = {
            key: value.clone().requires_grad_("correction_bias" not in key) for key, value in weights.items()
        }
        self.average = {key: value.clone() for key, value in weights.items()}
        matrices = [key for key in self.weights if _is_matrix(key)]
        others = [key for key in self.weights if key not in matrices and self.weights[key].requires_grad]
        self.optimizers = [
            Muon([self.weights[key] for key in matrices], recipe.muon_lr),
            torch.optim.AdamW(
                [self.weights[key] for key in others], recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0
            ),
        ]
        self._rates = [recipe.muon_lr, recipe.adam_lr]
        if self.file.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.step >= self.recipe.steps

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all weights that have one, in the same order in every process."""
        return [value.grad for value in self.weights.values() if value.grad is not None]

    def update(self, loads: Tensor) -> None:
        """Do one step of the optimizers, of the experts' balance and of the average, after a backward pass.

        loads (layers, E): the share of tokens that chose each expert. Experts above the mean of their layer become less
        likely to be chosen.
        """
        progress, start = self.step / self.recipe.steps, self.recipe.decay_from
        factor = min(1.0, (self.step + 1) / self.recipe.warmup, (1 - progress) / (1 - start))
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            biases = [value for key, value in self.weights.items() if "correction_bias" in key]
            for bias, load in zip(biases, loads, strict=True):
                bias.add_((load.mean() - load).sign(), alpha=BALANCE * factor)
            share = 1.0 if progress < start else 1 - self.recipe.averaging
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), share)
        self.step += 1

    def save(self) -> None:
        """Save the state to the phase's file, which is replaced completely or not at all."""
        part = self.file.with_suffix(".part")
        save_file(self._state(), part, metadata={"step": str(self.step)})
        part.replace(self.file)

    def _state(self) -> Weights:
        """Return everything that the next step depends on, except the step number."""
        state = {f"weights/{key}": value.detach() for key, value in self.weights.items()}
        state |= {f"average/{key}": value for key, value in self.average.items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, kept in optimizer.state_dict()["state"].items():
                state |= {f"optimizer/{number}/{place}/{key}": value for key, value in kept.items()}
        return state

    def _load(self) -> None:
        with safe_open(self.file, "pt", device=str(self.device)) as file:
            self.step = int(file.metadata()["step"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        with torch.no_grad():
            for key, value in self.weights.items():
                value.copy_(state[f"weights/{key}"])
                self.average[key].copy_(state[f"average/{key}"])
        for number, optimizer in enumerate(self.optimizers):
            kept: dict[int, Weights] = {}
            for name, value in state.items():
                kind, _, rest = name.partition(f"/{number}/")
                if kind == "optimizer":
                    place, key = rest.split("/")
                    kept.setdefault(int(place), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})


def _is_matrix(name: str) -> bool:
    """Return True if Muon trains the weight: a matrix inside a layer, except router and depthwise convolution."""
    if ".experts." in name:
        return True
    return name.startswith("layers.") and name.endswith("_proj.weight")


def average(tensors: list[Tensor]) -> None:
    """Replace the tensors by their averages over all training processes, in place."""
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def run_phase(phase: Phase, corpus: Corpus, loss: Loss) -> None:
    """Train the remaining steps of a phase, together with the other processes, which each take some rows of a step.

    The first process also prints progress lines and saves the state.
    """
    started, since = time.monotonic(), phase.step
    shown: list[tuple[float, float]] = []
    while not phase.done:
        batch = mask_blocks(corpus.batch(phase.step, phase.recipe.rows), phase.recipe, phase.recipe.seed + phase.step)
        share = slice(dist.get_rank(), None, dist.get_world_size())
        batch = {name: value[share].to(phase.device) for name, value in batch.items()}
        with torch.autocast(phase.device.type, torch.bfloat16):
            value, right, loads = loss(phase.weights, batch)
        value.backward()
        average([*phase.gradients(), loads])
        phase.update(loads)
        shown.append((value.item(), right.item()))
        if dist.get_rank():
            continue
        if phase.step % LOG_EVERY == 0 or phase.done:
            each = (time.monotonic() - started) / (phase.step - since)
            mean, right_share = (sum(column) / len(shown) for column in zip(*shown, strict=True))
            left = (phase.recipe.steps - phase.step) * each / 60
            print(
                f"{phase.name} {phase.step}/{phase.recipe.steps} loss {mean:.4f} right {right_share:.4f} "
                f"{each * 1000:.0f} ms per step, {left:.0f} min left, experts {loads.min():.2f}-{loads.max():.2f}",
                flush=True,
            )
            shown.clear()
        if phase.step % SAVE_EVERY == 0 or phase.done:
            phase.save()
