"""Makes the initial weights for training, and gives trained weights their names in the checkpoint."""

import math

import torch
from torch import Tensor

from model.checkpoint.config import TwoTowerConfig, expected_tensors

Weights = dict[str, Tensor]
"""The weights of one tower by the names that model.builtin.trainable uses, and those of its head as `head`."""


def fresh_weights(config: TwoTowerConfig, seed: int) -> Weights:
    """Return the initial weights of a context tower and its head, in float32; the same seed gives the same weights.

    The output projections of the mixers are 0, so that each layer is the identity at first.
    """
    generator = torch.Generator().manual_seed(seed)
    prefix, weights = "context_tower.", dict[str, Tensor]()
    for name, shape in expected_tensors(config, "context").items():
        short = "head" if name == "context_lm_head.weight" else name.removeprefix(prefix)
        normal = torch.randn(shape, generator=generator)
        uniform = torch.rand(shape, generator=generator)
        last = short.removesuffix(".weight").rpartition(".")[2]
        if last in ("out_proj", "o_proj", "down_proj", "bias", "e_score_correction_bias"):
            value = torch.zeros(shape)
        elif last in ("norm", "norm_f", "D"):
            value = torch.ones(shape)
        elif last == "dt_bias":  # time steps from 0.001 to 0.1, as in Mamba's initialisation
            value = torch.exp(math.log(1e-3) + uniform * math.log(100)).expm1().log()
        elif last == "A_log":
            value = torch.log(1 + 15 * uniform)
        elif last == "conv1d":
            value = (2 * uniform - 1) * shape[-1] ** -0.5
        else:
            value = normal * (0.5 if last == "embeddings" else shape[-1] ** -0.5)
        weights[short] = value
    return stack_experts(config, weights)


def with_time(config: TwoTowerConfig, weights: Weights, seed: int) -> Weights:
    """Return the initial weights of a denoiser: copies of the context tower's `weights`, plus time conditioning.

    The time conditioning has no effect yet: shift and scale are 0 and the gate is 1 at all times.
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser = {name: value.clone() for name, value in weights.items()}
    shapes = expected_tensors(config)
    for name in (n for n in shapes if n.startswith(("t_embedder.", "t_block.", "scale_shift_tables."))):
        zero = name.startswith("t_block") or name.endswith("bias")
        denoiser[name] = torch.zeros(shapes[name])
        if name.startswith("scale_shift_tables"):
            denoiser[name][2] = 1.0  # the gate
        elif not zero:
            denoiser[name] = torch.randn(shapes[name], generator=generator) * shapes[name][-1] ** -0.5
    return denoiser


def stack_experts(config: TwoTowerConfig, weights: Weights) -> Weights:
    """Return the weights with the experts of each layer stacked in one tensor.

    `mixer.experts.{e}.up_proj.weight` of all experts e becomes `mixer.experts.up` (E, width, H), and so for down.
    """
    stacked = {name: value for name, value in weights.items() if ".experts." not in name}
    for i in config.layers_of("moe"):
        for kind in ("up", "down"):
            each = [f"layers.{i}.mixer.experts.{e}.{kind}_proj.weight" for e in range(config.n_routed_experts)]
            stacked[f"layers.{i}.mixer.experts.{kind}"] = torch.stack([weights[name] for name in each])
    return stacked


def checkpoint_names(weights: Weights, tower: str, head: str) -> Weights:
    """Return the weights by their names in the checkpoint, with one tensor per expert.

    tower, head: the names of this tower and of its head in the checkpoint.
    """
    named: Weights = {}
    for name, value in weights.items():
        if name.endswith((".experts.up", ".experts.down")):
            stem, _, kind = name.rpartition(".")
            named |= {f"{tower}.{stem}.{e}.{kind}_proj.weight": expert for e, expert in enumerate(value)}
        elif name == "head":
            named[f"{head}.weight"] = value
        elif name.startswith(("layers.", "embeddings.", "norm_f.")):
            named[f"{tower}.{name}"] = value
        else:
            named[name] = value
    return named
