"""Defines the config.json of builtin:tiny and the settings of its training phases."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.builtin import noise as noise

SEED = 20261122
VOCAB_SIZE = 1056  # more than the tokenizer has tokens; a multiple of 32 suits the devices

CONFIG: Mapping[str, object] = {
    **noise.CONFIG,
    "hidden_size": 128,
    "vocab_size": VOCAB_SIZE,
    "hybrid_override_pattern": "MEM*EM*EM*E",
    "num_hidden_layers": 11,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "num_attention_heads": 6,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
}
"""The config.json of builtin:tiny: that of builtin:noise with larger sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of one training phase."""

    steps: int
    seed: int = SEED
    rows: int = 16
    """Rows per step."""
    muon_lr: float = 0.02
    """Learning rate of Muon, before warmup and decay; see model.builtin.optimizer."""
    adam_lr: float = 3e-3
    """Learning rate of AdamW, before warmup and decay."""
    warmup: int = 50
    """Number of first steps in which the learning rates rise linearly."""
    decay_from: float
    """Share of the steps after which the learning rates fall linearly to 0 and the weights are averaged."""
    averaging: float = 0.995
    """Share of the old average that stays in the average of the weights at each step after `decay_from`."""
    blocks: int = 12
    """Number of blocks of each row that are masked and denoised in a step. The context tower's phases ignore them."""
    all_masked: float = 0.25
    """Share of blocks that are masked completely, as every block is before its first denoiser forward."""
    tail_masked: float = 0.0
    """Share of blocks that are masked from some position to their end, as a block is if each of its tokens depends on
    the one before."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Shares of some tasks among the examples, by task name, which replace those in model.builtin.tasks.TASKS."""


PHASES: Mapping[str, Recipe] = {
    "context": Recipe(steps=2000, decay_from=0.5),
    # trains again at the full rate, mostly on the worst task: copying a name from a list far back is learned late
    "context_polish": Recipe(steps=600, seed=SEED + 500, decay_from=0.2, shares={"letter": 0.6}),
    "denoiser": Recipe(steps=3400, decay_from=0.33),
    # trains the denoiser again as well, on its worst tasks
    "denoiser_polish": Recipe(
        steps=1000,
        seed=SEED + 1000,
        muon_lr=0.006,
        adam_lr=1e-3,
        decay_from=0.0,
        averaging=0.99,
        all_masked=0.3,
        tail_masked=0.4,
        shares={"sort": 0.2, "count": 0.3, "sum": 0.2, "series": 0.3},
    ),
}
