"""Defines the sizes of models with random weights, because no checkpoint of the released size is available."""

from dataclasses import replace

from model.builtin.noise import CONFIG as NOISE
from model.builtin.recipe import CONFIG as TINY
from model.checkpoint.config import TwoTowerConfig
from model.checkpoint.released import RELEASED_CONFIG

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
    "tiny": TwoTowerConfig.from_dict(dict(TINY)),
    "mid": MID,
    "released": RELEASED_CONFIG,
}
