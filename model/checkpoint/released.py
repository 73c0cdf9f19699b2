"""Holds the config of the released checkpoint, for estimates and tests without its weights. Does not import torch."""

from collections.abc import Mapping

from model.checkpoint.config import TwoTowerConfig

RELEASED: Mapping[str, object] = {
    "hidden_size": 2688,
    "vocab_size": 131072,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 131072,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "eos_token_id": 2,
}
"""The fields of the released config.json that decide how the model computes."""

RELEASED_CONFIG = TwoTowerConfig.from_dict(dict(RELEASED))
