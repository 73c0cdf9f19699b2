"""Models of random weights made on their device: no checkpoint of the released size is at hand."""

import math
from dataclasses import replace

import torch

from model.config import TwoTowerConfig
from model.noise.make import CONFIG as NOISE
from model.two_tower import TwoTower
from tests.released import RELEASED_CONFIG

MID = replace(
    RELEASED_CONFIG,
    hidden_size=1024,
    vocab_size=32768,
    layer_kinds=RELEASED_CONFIG.layer_kinds[:14],
    mamba_num_heads=32,
    num_attention_heads=16,
    n_routed_experts=32,
    moe_intermediate_size=768,
    moe_shared_expert_intermediate_size=1536,
)
SIZES: dict[str, TwoTowerConfig] = {
    "noise": TwoTowerConfig.from_dict(dict(NOISE)),
    "mid": MID,
    "released": RELEASED_CONFIG,
}


@torch.no_grad()
def random_pair(config: TwoTowerConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> TwoTower:
    """Both towers; a weight's size is such that what passes through it keeps its own."""
    pair = TwoTower(config, dtype, [device])
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in pair.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            weight.uniform_(0, math.log(16), generator=generator)
        elif last == "dt_bias":
            weight.uniform_(-6.9, -2.3, generator=generator)  # dt of 0.001 to 0.1 after softplus
        elif last == "e_score_correction_bias" or last == "bias":
            weight.zero_()
        elif weight.dim() == 1:  # norms, D
            weight.fill_(1.0)
        else:
            weight.normal_(0, 0.02 if name.startswith("tables") else weight.shape[-1] ** -0.5, generator=generator)
    return pair
