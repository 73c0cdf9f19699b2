"""Reads a checkpoint's config.json: the sizes of both towers, and the tensors that they need. Does not import torch.

Fields have the names of config.json, except `layer_kinds` (hybrid_override_pattern) and `eos_token_ids` (eos_token_id,
which is an id, a list or null). Both towers have the same form, so each field holds for both. The code must not assume
that heads x head_dim equals hidden_size: in the released model they differ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model.errors import CheckpointError

LayerKind = Literal["mamba", "attention", "moe"]
Towers = Literal["both", "context"]
"""The towers to load: both, or only the context tower, which is all that AR mode needs."""

LAYER_LETTERS: Mapping[str, LayerKind] = {"M": "mamba", "*": "attention", "E": "moe"}
"""The kind of layer for each letter of hybrid_override_pattern."""
TIME_EMBEDDING_SIZE = 256
"""Width of the sinusoidal time embedding. The released code fixes it; config.json does not contain it."""
DEFAULT_MASK_TOKEN_ID = 3
"""The mask id if mask_token_id is missing in config.json, as in the released model, or null.

It is the default of the released inference code.
"""

# Options that change the computation, with the only value that this code supports. An absent option has that value.
_ONLY_SUPPORTED: Mapping[str, object] = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "residual_in_fp32": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTowerConfig:
    """The sizes of one tower, which are the same for both, and the special token ids."""

    hidden_size: int
    vocab_size: int
    layer_kinds: tuple[LayerKind, ...]
    layer_norm_epsilon: float
    max_position_embeddings: int
    """The largest number of tokens of a row, prompt and completion together."""

    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    """The number of groups of Mamba heads. The heads of a group share B and C, and the gated norm normalises each group
    separately."""
    ssm_state_size: int
    conv_kernel: int
    """The number of taps of the causal convolution. Between forwards the context cache keeps as many inputs of a row,
    of which the next token needs all but the oldest."""
    time_step_limit: tuple[float, float]
    """The least and the largest dt of the Mamba scan; smaller and larger values are replaced by them."""
    chunk_size: int
    """Tokens per chunk of the released model's own scan. The kernels here choose their chunks themselves, and only the
    check of the kernels uses this value, to choose the lengths of its rows."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool

    mask_token_id: int
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def mamba_inner(self) -> int:
        """The number of channels of x, z and y in a Mamba mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """The number of channels of the convolution: x | B | C."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_size(self) -> int:
        """The number of rows of a Mamba in_proj: z | x | B | C | dt."""
        return self.mamba_inner + self.conv_dim + self.mamba_num_heads

    @property
    def attention_inner(self) -> int:
        """The number of rows of the weight q_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_inner(self) -> int:
        """The number of rows of k_proj, and also of v_proj."""
        return self.num_key_value_heads * self.head_dim

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        """Return the indices of the layers of one kind."""
        return tuple(i for i, layer_kind in enumerate(self.layer_kinds) if layer_kind == kind)

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> "TwoTowerConfig":
        """Return the config from the parsed config.json.

        Raises CheckpointError if a field is missing or wrong, or has a value that this code does not support.
        """
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"config.json holds a {type(raw).__name__}: it must be an object of fields")
        for name, supported in _ONLY_SUPPORTED.items():
            value = raw.get(name, supported)
            if value != supported or isinstance(value, bool) != isinstance(supported, bool):
                raise CheckpointError(f"config.json: {name} is {value!r}; only {supported!r} is supported")
        mask_id = _token_id(raw, "mask_token_id")
        config = cls(
            layer_kinds=_layer_kinds(raw),
            layer_norm_epsilon=_number(raw, "layer_norm_epsilon", above=0.0),
            routed_scaling_factor=_number(raw, "routed_scaling_factor", above=0.0),
            time_step_limit=_time_step_limit(raw.get("time_step_limit", (0.0, math.inf))),
            norm_topk_prob=_flag(raw, "norm_topk_prob"),
            mask_token_id=DEFAULT_MASK_TOKEN_ID if mask_id is None else mask_id,
            bos_token_id=_token_id(raw, "bos_token_id"),
            pad_token_id=_token_id(raw, "pad_token_id"),
            eos_token_ids=_eos_ids(raw),
            **{name: _size(raw, name) for name in _SIZES},
        )
        _check_sizes_fit(config)
        return config


_SIZES = (
    "hidden_size",
    "vocab_size",
    "max_position_embeddings",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "chunk_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
)


def expected_tensors(config: TwoTowerConfig, towers: Towers = "both") -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint must hold, by name; with "context", only those for AR mode."""
    head = (config.vocab_size, config.hidden_size)
    shapes = _tower_tensors(config, "context_tower.") | {"context_lm_head.weight": head}
    if towers == "context":
        return shapes
    hidden = config.hidden_size
    shapes |= _tower_tensors(config, "denoiser_tower.") | {
        "lm_head.weight": head,
        "t_embedder.mlp.0.weight": (hidden, TIME_EMBEDDING_SIZE),
        "t_embedder.mlp.0.bias": (hidden,),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "t_embedder.mlp.2.bias": (hidden,),
        "t_block.1.weight": (3 * hidden, hidden),
        "t_block.1.bias": (3 * hidden,),
    }
    return shapes | {f"scale_shift_tables.{i}": (3, hidden) for i in range(config.num_layers)}


def _tower_tensors(config: TwoTowerConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "embeddings.weight": (config.vocab_size, hidden),
        prefix + "norm_f.weight": (hidden,),
    }
    for index, kind in enumerate(config.layer_kinds):
        layer = f"{prefix}layers.{index}."
        shapes[layer + "norm.weight"] = (hidden,)
        shapes |= {f"{layer}mixer.{name}": shape for name, shape in mixer_tensors(config, kind).items()}
    return shapes


def mixer_tensors(config: TwoTowerConfig, kind: LayerKind) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a mixer, by its name after `layers.{i}.mixer.`; linear weights (out, in)."""
    hidden, inner, heads = config.hidden_size, config.mamba_inner, config.mamba_num_heads
    if kind == "mamba":
        return {
            "in_proj.weight": (config.in_proj_size, hidden),
            "conv1d.weight": (config.conv_dim, 1, config.conv_kernel),
            "conv1d.bias": (config.conv_dim,),
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        }
    if kind == "attention":
        return {
            "q_proj.weight": (config.attention_inner, hidden),
            "k_proj.weight": (config.kv_inner, hidden),
            "v_proj.weight": (config.kv_inner, hidden),
            "o_proj.weight": (hidden, config.attention_inner),
        }
    shared = config.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (config.n_routed_experts, hidden),
        "gate.e_score_correction_bias": (config.n_routed_experts,),
        "shared_experts.up_proj.weight": (shared, hidden),
        "shared_experts.down_proj.weight": (hidden, shared),
    }
    for expert in range(config.n_routed_experts):
        shapes[f"experts.{expert}.up_proj.weight"] = (config.moe_intermediate_size, hidden)
        shapes[f"experts.{expert}.down_proj.weight"] = (hidden, config.moe_intermediate_size)
    return shapes


def _field(raw: Mapping[str, object], name: str) -> object:
    if name not in raw:
        raise CheckpointError(f"config.json: {name} is missing")
    return raw[name]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(raw: Mapping[str, object], name: str) -> int:
    value = _field(raw, name)
    if not isinstance(value, int) or not _is_int(value) or value < 1:
        raise CheckpointError(f"config.json: {name} is {value!r}; it must be a whole number of at least 1")
    return value


def _number(raw: Mapping[str, object], name: str, above: float) -> float:
    value = _field(raw, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < math.inf:
        raise CheckpointError(f"config.json: {name} is {value!r}; it must be a number above {above:g}")
    return float(value)


def _flag(raw: Mapping[str, object], name: str) -> bool:
    value = _field(raw, name)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} is {value!r}; it must be true or false")
    return value


def _token_id(raw: Mapping[str, object], name: str) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or not _is_int(value) or not 0 <= value < _size(raw, "vocab_size"):
        raise CheckpointError(f"config.json: {name} is {value!r}; it must be a token id below vocab_size or null")
    return value


def _eos_ids(raw: Mapping[str, object]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    ids: list[int] = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(item, int) or not _is_int(item) or not 0 <= item < _size(raw, "vocab_size"):
            raise CheckpointError(f"config.json: eos_token_id is {value!r}; it must be token ids below vocab_size")
        ids.append(item)
    return tuple(dict.fromkeys(ids))


def _layer_kinds(raw: Mapping[str, object]) -> tuple[LayerKind, ...]:
    pattern = _field(raw, "hybrid_override_pattern")
    if not isinstance(pattern, str) or not pattern:
        raise CheckpointError(f"config.json: hybrid_override_pattern is {pattern!r}; it must be a string of M, * and E")
    for letter in pattern:
        if letter not in LAYER_LETTERS:
            raise CheckpointError(
                f"config.json: hybrid_override_pattern holds {letter!r}; "
                "supported are M (Mamba-2), * (attention) and E (MoE)"
            )
    layers = raw.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {layers!r}, but hybrid_override_pattern has {len(pattern)} layers"
        )
    return tuple(LAYER_LETTERS[letter] for letter in pattern)


def _time_step_limit(value: object) -> tuple[float, float]:
    """Return time_step_limit: the least and the largest dt. Raises CheckpointError if `value` is not two such numbers.

    Infinity is a bare `Infinity` in the file, or {"__float__": "Infinity"} if newer transformers wrote it.
    """
    if isinstance(value, (list, tuple)) and len(value) == 2:
        low, high = (math.inf if item == {"__float__": "Infinity"} else item for item in value)
        if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high)) and 0 <= low <= high:
            return float(low), float(high)
    raise CheckpointError(f"config.json: time_step_limit is {value!r}; it must be two numbers, 0 <= lowest <= highest")


def _check_sizes_fit(config: TwoTowerConfig) -> None:
    for name, divisor_name in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
        value, divisor = getattr(config, name), getattr(config, divisor_name)
        if value % divisor:
            raise CheckpointError(f"config.json: {name} is {value}; it must be a multiple of {divisor_name}, {divisor}")
    if config.num_experts_per_tok > config.n_routed_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {config.num_experts_per_tok}; "
            f"it must be at most n_routed_experts, {config.n_routed_experts}"
        )
    if config.conv_kernel < 2:
        raise CheckpointError(f"config.json: conv_kernel is {config.conv_kernel}; it must be at least 2")
    if config.max_position_embeddings < 2:
        raise CheckpointError(
            f"config.json: max_position_embeddings is {config.max_position_embeddings}; it must be at least 2"
        )
    if config.mask_token_id >= config.vocab_size:
        raise CheckpointError(
            f"config.json: the mask id is {config.mask_token_id}; it must be below vocab_size, {config.vocab_size}"
        )
