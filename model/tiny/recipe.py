"""What builtin:tiny is and how it is trained: its config.json, and the numbers of both phases."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.tiny.bpe import BOS, EOS, MASK, PAD

SEED = 20261121
VOCAB_SIZE = 1024  # the tokenizer finds fewer tokens: a multiple of 32 suits the devices

CONFIG: Mapping[str, object] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "vocab_size": VOCAB_SIZE,
    "hybrid_override_pattern": "MEM*EM*EM*E",
    "num_hidden_layers": 11,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "mask_token_id": MASK,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "time_step_limit": [0.0, float("inf")],
    "chunk_size": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "sliding_window": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The numbers of one phase."""

    steps: int
    seed: int = SEED
    rows: int = 16
    """Of a step."""
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 50
    decay_from: float
    """Share of the steps after which learning rates fall to 0 in a straight line, and weights are averaged."""
    averaging: float = 0.995
    blocks: int = 12
    """Blocks of a row that the denoiser sees in a step."""
    all_masked: float = 0.25
    """Share of blocks that are masked whole, as every block is at first."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of some tasks, instead of their usual ones."""


PHASES: Mapping[str, Recipe] = {
    "context": Recipe(steps=1500, decay_from=0.4),
    "denoiser": Recipe(steps=3400, decay_from=0.33),
    # the denoiser once more, at the tasks that it is worst at
    "polish": Recipe(
        steps=1000,
        seed=SEED + 1000,
        muon_lr=0.006,
        adam_lr=1e-3,
        decay_from=0.0,
        averaging=0.99,
        all_masked=0.4,
        shares={"sort": 0.3, "count": 0.3, "sum": 0.2},
    ),
}
