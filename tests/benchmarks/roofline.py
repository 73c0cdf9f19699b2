"""Estimates how long a forward of the released model takes on a GPU, layer by layer.

The estimate needs neither a GPU nor torch. A layer takes the longer of the time to move its bytes (over the bandwidth)
and the time of its operations (over the peak); a forward takes the sum of its layers. Counted are weights (of the
experts, those that the tokens are expected to reach), Mamba states, keys and values, hidden states and logits. Not
counted are launches beyond `layer_overhead_s`, time conditioning (58 MB of weights per forward) and norms.
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
    """One GPU. The two shares say how much of its data sheet good kernels reach; they are assumed, not measured."""

    bandwidth: float = 3.35e12
    """Bytes per second. The defaults are those of an H100 SXM with 80 GB."""
    flops: float = 989e12
    """Dense bfloat16 operations per second."""
    bandwidth_share: float = 0.8
    flops_share: float = 0.6
    link: float = 450e9
    """Bytes per second to another GPU (NVLink, one direction)."""
    layer_overhead_s: float = 10e-6
    """Seconds that the launches of a layer add, with CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Work:
    """The size of one forward."""

    rows: int
    tokens: int
    """Tokens of all rows, including padding if it is computed."""
    context: int = 0
    """Context tokens of all rows, which attention reads."""
    pairs: float = 0.0
    """Query-key pairs of all rows."""
    logits: int = 0
    """Number of positions whose logits are computed."""
    store: bool = False
    """Whether the forward writes states, keys and values: the context tower does, the denoiser tower does not."""


def released() -> TwoTowerConfig:
    """Return the configuration of the released model."""
    return RELEASED_CONFIG


class Roofline:
    """The estimated costs of one tower of `config` on `hardware`."""

    def __init__(self, config: TwoTowerConfig, hardware: Hardware) -> None:
        self.config = config
        self.hardware = hardware
        kinds: tuple[LayerKind, ...] = ("mamba", "attention", "moe")
        # hidden_size: the weights of the norm before each mixer
        self.layer = {kind: config.hidden_size + sum(map(prod, mixer_tensors(config, kind).values())) for kind in kinds}
        self.expert = 2 * config.hidden_size * config.moe_intermediate_size
        self.head = config.vocab_size * config.hidden_size
        self.state_bytes = (
            config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * STATE_BYTES
            + config.conv_dim * config.conv_kernel * WEIGHT_BYTES
        )
        """Bytes of one row's state in one Mamba layer."""

    def parameters(self) -> int:
        """Return the number of parameters of one tower: layers, embedding, final norm, head."""
        layers = sum(self.layer[kind] for kind in self.config.layer_kinds)
        return layers + 2 * self.head + self.config.hidden_size

    def active_parameters(self) -> int:
        """Return the number of parameters of one tower that a token reaches."""
        idle = self.config.n_routed_experts - self.config.num_experts_per_tok
        return self.parameters() - len(self.config.layers_of("moe")) * idle * self.expert

    def row_state_bytes(self, layers: range) -> int:
        """Return the bytes of one row's Mamba states in `layers`."""
        return self.state_bytes * sum(self.config.layer_kinds[i] == "mamba" for i in layers)

    def kv_bytes_per_token(self) -> int:
        """Return the bytes of keys and values of one token in all attention layers."""
        return 2 * self.config.kv_inner * WEIGHT_BYTES * len(self.config.layers_of("attention"))

    def experts_reached(self, tokens: int) -> float:
        """Return how many experts of a layer `tokens` tokens are expected to reach if routing is even."""
        share = self.config.num_experts_per_tok / self.config.n_routed_experts
        return self.config.n_routed_experts * (1 - (1 - share) ** tokens)

    def seconds(self, layers: range, work: Work) -> float:
        """Return the seconds of one forward through `layers`, with the logits if `layers` end with the last layer."""
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
