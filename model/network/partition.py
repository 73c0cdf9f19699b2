"""Which layers run where: contiguous ranges of both towers, one a stage, that weigh about the same. Free of torch."""

from itertools import accumulate, pairwise
from math import prod

from model.checkpoint.config import Towers, TwoTowerConfig, mixer_tensors
from model.errors import RequestError


def partition(config: TwoTowerConfig, stages: int, towers: Towers = "both") -> list[tuple[range, range]]:
    """Layers of the context tower and of the denoiser for each stage.

    A layer with a state lies on the same stage in both towers, as the denoiser reads the context's states there. The
    towers may part at different MoE layers, which have none: 23 MoE layers, nearly all of the weights, do not halve.
    Raises RequestError for more stages than layers.
    """
    layers = config.num_layers
    if stages > layers:
        raise RequestError(f"{stages} devices for {layers} layers: give at most one device a layer")
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
    """Whether no layer between the borders has a state."""
    return all(config.layer_kinds[i] == "moe" for i in range(min(a, b), max(a, b)))


def _weights(config: TwoTowerConfig) -> list[int]:
    """Parameters of each layer of one tower."""
    kinds = {kind: sum(map(prod, mixer_tensors(config, kind).values())) for kind in set(config.layer_kinds)}
    return [kinds[kind] for kind in config.layer_kinds]
