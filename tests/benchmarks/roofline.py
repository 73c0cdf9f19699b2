"""How long a forward of the released model takes on a GPU: bytes over bandwidth or operations over peak, a layer.

An estimate without a GPU, free of torch. A layer takes the longer of the time to move its bytes and the time of its
operations; a forward is the sum of its layers. Counted: weights (of the experts, those that the tokens are expected to
reach), Mamba states, keys and values, hidden states, logits. Not counted: launches beyond `layer_overhead_s`, time
conditioning (58 MB of weights a forward), norms.
"""

from dataclasses import dataclass
from math import prod

from model.checkpoint.config import LayerKind, TwoTowerConfig, mixer_tensors
from model.checkpoint.released import RELEASED_CONFIG

WEIGHT_BYTES = 2  # bfloat16
STATE_BYTES = 4  # Mamba states are float32
LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU. The two shares are what well-made kernels reach of the data sheet, assumed here and not measured."""

    bandwidth: float = 3.35e12
    """Bytes a second. Defaults: H100 SXM, 80 GB."""
    flops: float = 989e12
    """Dense bfloat16 operations a second."""
    bandwidth_share: float = 0.8
    flops_share: float = 0.6
    link: float = 450e9
    """Bytes a second to another GPU (NVLink, one direction)."""
    layer_overhead_s: float = 10e-6
    """What a layer's launches add, with CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward computes."""

    rows: int
    tokens: int
    """Of all rows, padding counted where it is computed."""
    context: int = 0
    """Tokens of context of all rows, read by attention."""
    pairs: float = 0.0
    """Query-key pairs of all rows."""
    logits: int = 0
    """Positions whose logits are computed."""
    store: bool = False
    """The context tower writes states, keys and values; the denoiser only reads them."""


def released() -> TwoTowerConfig:
    """The released model's shape."""
    return RELEASED_CONFIG


class Roofline:
    """Seconds of forwards of one tower of `config` on `hardware`."""

    def __init__(self, config: TwoTowerConfig, hardware: Hardware) -> None:
        self.config = config
        self.hardware = hardware
        kinds: tuple[LayerKind, ...] = ("mamba", "attention", "moe")
        # the norm before each mixer is a vector more
        self.layer = {kind: config.hidden_size + sum(map(prod, mixer_tensors(config, kind).values())) for kind in kinds}
        self.expert = 2 * config.hidden_size * config.moe_intermediate_size
        self.head = config.vocab_size * config.hidden_size
        self.state_bytes = (
            config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * STATE_BYTES
            + config.conv_dim * config.conv_kernel * WEIGHT_BYTES
        )
        """Of one row in one Mamba layer."""

    def parameters(self) -> int:
        """Of one tower: layers, embedding, final norm, head."""
        layers = sum(self.layer[kind] for kind in self.config.layer_kinds)
        return layers + 2 * self.head + self.config.hidden_size

    def active_parameters(self) -> int:
        """Of one tower, those that a token reaches."""
        idle = self.config.n_routed_experts - self.config.num_experts_per_tok
        return self.parameters() - len(self.config.layers_of("moe")) * idle * self.expert

    def row_state_bytes(self, layers: range) -> int:
        """Mamba states of one row in `layers`."""
        return self.state_bytes * sum(self.config.layer_kinds[i] == "mamba" for i in layers)

    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all attention layers."""
        return 2 * self.config.kv_inner * WEIGHT_BYTES * len(self.config.layers_of("attention"))

    def experts_reached(self, tokens: int) -> float:
        """How many experts of a layer `tokens` tokens are expected to reach, were the choice even."""
        share = self.config.num_experts_per_tok / self.config.n_routed_experts
        return self.config.n_routed_experts * (1 - (1 - share) ** tokens)

    def seconds(self, layers: range, work: Work) -> float:
        """One forward through `layers`; the head's logits too, where they end with the last one."""
        kinds = [self.config.layer_kinds[i] for i in layers]
        total = sum(kinds.count(kind) * self._layer_seconds(kind, work) for kind in self.layer)
        if layers.stop == self.config.num_layers and work.logits:
            # logits are written and read once
            moved = self.head * WEIGHT_BYTES + 2 * work.logits * self.config.vocab_size * LOGIT_BYTES
            total += self._seconds(moved, 2.0 * self.head * work.logits)
        return total

    def _layer_seconds(self, kind: LayerKind, work: Work) -> float:
        c = self.config
        moved = 4.0 * work.tokens * c.hidden_size * WEIGHT_BYTES  # read and written, by the norm and by the mixer
        if kind == "moe":
            dense = self.layer["moe"] - c.n_routed_experts * self.expert
            moved += (dense + self.experts_reached(work.tokens) * self.expert) * WEIGHT_BYTES
            flops = 2.0 * work.tokens * (dense + c.num_experts_per_tok * self.expert)
        else:
            moved += self.layer[kind] * WEIGHT_BYTES
            flops = 2.0 * work.tokens * self.layer[kind]
        if kind == "mamba":
            moved += work.rows * self.state_bytes * (2 if work.store else 1)
            moved += 2.0 * work.tokens * c.in_proj_size * WEIGHT_BYTES
            flops += 6.0 * work.tokens * c.mamba_inner * c.ssm_state_size  # decay, add, read out
        if kind == "attention":
            moved += 2.0 * work.context * c.kv_inner * WEIGHT_BYTES
            flops += 4.0 * work.pairs * c.attention_inner
        return self._seconds(moved, flops) + self.hardware.layer_overhead_s

    def _seconds(self, moved: float, flops: float) -> float:
        gpu = self.hardware
        return max(moved / (gpu.bandwidth * gpu.bandwidth_share), flops / (gpu.flops * gpu.flops_share))
