"""Divides the layers of both towers among stages of about equally many parameters each. Does not import torch."""

from itertools import accumulate, pairwise
from math import prod

from model.checkpoint.config import Towers, TwoTowerConfig, mixer_tensors
from model.errors import RequestError


def partition(config: TwoTowerConfig, stages: int, towers: Towers = "both") -> list[tuple[range, range]]:
    """Return, for each stage, its contiguous range of layers of the context tower, and that of the denoiser tower.

    A layer with a state (Mamba, attention) is on the same stage in both towers, because the denoiser reads the
    context's states there. MoE layers have no state, so the two towers may be divided at different MoE layers. This
    matters because the 23 MoE layers of the released model hold nearly all of its weights, and 23 cannot be halved. If
    `towers` is "context", both ranges of a stage are equal. Raises RequestError if there are more stages than layers.
    """
    layers = config.num_layers
    if stages > layers:
        raise RequestError(f"{stages} devices for {layers} layers: give at most one device per layer")
    before = list(accumulate(_weights(config), initial=0))  # parameters before each layer of a tower
    embeddings = 2 * config.vocab_size * config.hidden_size  # of both towers, before the first layer
    total = 2 * (before[-1] + embeddings)  # a head is as large as an embedding
    borders = [(0, 0)]
    for stage in range(1, stages):
        reach = range(borders[-1][0] + 1, layers - (stages - stage) + 1)
        pairs = [(c, d) for c in reach for d in reach if d > borders[-1][1] and _stateless(config, c, d)]
        if towers == "context":
            pairs = [(c, d) for c, d in pairs if c == d]
        off = {(c, d): abs(embeddings + before[c] + before[d] - total * stage / stages) for c, d in pairs}
        borders.append(min(pairs, key=lambda pair: (off[pair], abs(pair[0] - pair[1]))))
    borders.append((layers, layers))
    return [(range(a[0], b[0]), range(a[1], b[1])) for a, b in pairwise(borders)]


def _stateless(config: TwoTowerConfig, a: int, b: int) -> bool:
    """Return True if all layers between the borders `a` and `b` are MoE layers, which have no state."""
    return all(config.layer_kinds[i] == "moe" for i in range(min(a, b), max(a, b)))


def _weights(config: TwoTowerConfig) -> list[int]:
    """Return the number of parameters of each layer's mixer in one tower; its norm is too small to matter."""
    kinds = {kind: sum(map(prod, mixer_tensors(config, kind).values())) for kind in set(config.layer_kinds)}
    return [kinds[kind] for kind in config.layer_kinds]
