"""Estimates how many bytes one forward needs besides weights, context cache and logits: its largest temporaries.

The results are upper limits, over the kinds of layers, of what model.network.layers holds at once, with
model.kernels.plain and with the kernels of a GPU. tests/model/memory/test_planner.py checks that measured peaks of both
are below them (for the GPU kernels, in Triton's interpreter).
"""

from dataclasses import dataclass

from model.checkpoint.config import TwoTowerConfig
from model.kernels.plain import MIN_GEMM_ROWS, SCAN_CHUNK, SCAN_ELEMENTS
from model.kernels.plain_attention import MAX_GATHERED, QUERIES
from model.kernels.triton.attention_plan import MIN_QUERIES, PROGRAMS, power_of_two
from model.kernels.triton.attention_plan import QUERIES as TILE_QUERIES
from model.runtime.page_allocator import PAGE_SIZE, pages_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """The size of the forward whose memory is estimated, the largest of its kind."""

    tokens: int
    """Tokens of all rows together, including padding."""
    rows: int
    queries: int
    """Tokens of one row whose attention over the context is computed at once, each with its own mask."""


def causal_queries(device_type: str) -> int:
    """Return how many tokens of a prompt have their attention over the context computed at once."""
    return PAGE_SIZE if device_type == "cpu" else max(PAGE_SIZE, QUERIES)


def plain_forward_bytes(config: TwoTowerConfig, itemsize: int, layers: range, forward: Forward, context: int) -> int:
    """Return an upper limit of the bytes that a forward through one stage's `layers`, of either tower, needs with the
    plain kernels, which are those of a CPU.

    itemsize: bytes per number in the model's dtype. context: tokens of the longest context of a row.
    """
    kinds = {config.layer_kinds[i] for i in layers}
    largest = 0
    if "mamba" in kinds:
        largest = _mamba(config, itemsize, forward)
    if "attention" in kinds:
        largest = max(largest, _attention(config, itemsize, forward, context))
    if "moe" in kinds:
        largest = max(largest, _moe(config, itemsize, forward.tokens))
    hidden = forward.tokens * config.hidden_size
    # residual, normed input, mixer output and its gated copy; shift, scale and gate; float32 copies of a norm
    residuals = 7 * hidden * itemsize + 2 * hidden * 4
    # the denoiser's conditioning, with room for all layers of the stage
    time = (len(layers) + 1) * forward.rows * 3 * config.hidden_size * itemsize
    return residuals + time + largest


def _mamba(config: TwoTowerConfig, itemsize: int, forward: Forward) -> int:
    """Return an upper limit of the bytes that a Mamba layer needs with the plain kernels."""
    conv, inner, heads = config.conv_dim, config.mamba_inner, config.mamba_num_heads
    padded = forward.tokens + forward.rows * (SCAN_CHUNK - 1)
    # in_proj's output, the conv inputs twice; in float32 the conv's terms or the scan's inputs, plus the scan's outputs
    a_token = itemsize * (config.in_proj_size + 2 * conv) + 4 * (3 * conv + 3 * inner + 4 * heads)
    state = inner * config.ssm_state_size
    together = min(-(-padded // SCAN_CHUNK), max(forward.rows, SCAN_ELEMENTS // state))  # chunks computed at once
    # decays and products between the tokens of a chunk; scaled and reordered copies of its x, B and C; its outputs
    mixed = 4 * heads * SCAN_CHUNK + 7 * inner + 3 * config.n_groups * config.ssm_state_size
    # states before each chunk, states that each chunk adds, all states in one tensor; gathered states, last states
    states = 3 * together * state + 2 * forward.rows * state
    history = 2 * forward.rows * conv * config.conv_kernel * itemsize
    return padded * a_token + 4 * (together * SCAN_CHUNK * mixed + states) + history


def _attention(config: TwoTowerConfig, itemsize: int, forward: Forward, context: int) -> int:
    """Return an upper limit of the bytes that an attention layer needs with the plain kernels."""
    query, kv = config.attention_inner, config.kv_inner
    # q, k, v, k and v again, the output; for queries padded to a power of two, four copies: selected, reordered, the
    # output, reordered
    projected = forward.tokens * itemsize * (10 * query + 6 * kv)
    # two pieces of one row never have equally many keys, so they are not computed together
    gathered = min(max(MAX_GATHERED, context), forward.rows * pages_for(context) * PAGE_SIZE)
    repeat = config.num_attention_heads // config.num_key_value_heads
    mask = gathered * forward.queries * repeat * (itemsize + 1)
    return projected + gathered * (2 * kv * itemsize + 4 * 8) + mask  # 8: index tensors


def _moe(config: TwoTowerConfig, itemsize: int, tokens: int) -> int:
    """Return an upper limit of the bytes that a MoE layer needs with the plain kernels."""
    hidden, experts, chosen = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    router = 8 * (tokens * (hidden + 4 * experts) + experts * hidden)  # float64
    pairs = tokens * chosen + min(experts, tokens * chosen) * MIN_GEMM_ROWS  # each expert's few rows are padded
    outputs = pairs * hidden * itemsize
    one = tokens * itemsize * (hidden + 3 * config.moe_intermediate_size)  # an expert that every token chooses
    # expert inputs and outputs; the outputs concatenated, in the order of the tokens, and weighted
    routed = max(2 * outputs + one, 3 * outputs) + 6 * 8 * pairs
    shared = tokens * itemsize * (hidden + 3 * config.moe_shared_expert_intermediate_size)
    return max(router, routed, shared)


def cuda_forward_bytes(
    config: TwoTowerConfig, itemsize: int, layers: range, forward: Forward, prompts: Forward | None = None
) -> int:
    """Return the upper limit of `plain_forward_bytes` for the kernels of a GPU. There the length of the context has no
    effect.

    prompts: the size of the pieces of prompts that the forward reads beside its blocks, or None if it reads none. Mamba
    layers scan them with mamba-ssm, padded to the longest one, as the plain kernels do.
    """
    kinds = {config.layer_kinds[i] for i in layers}
    tokens, largest = forward.tokens, 0
    if "mamba" in kinds:
        # in_proj's output and the gated, normalised output; in float32 the outputs of the convolution and of the scan
        largest = tokens * (itemsize * (config.in_proj_size + config.mamba_inner))
        largest += tokens * 4 * (config.conv_dim + config.mamba_inner)
        largest += _mamba(config, itemsize, prompts) if prompts else 0
    if "attention" in kinds:
        largest = max(largest, _cuda_attention(config, itemsize, tokens))
    if "moe" in kinds:
        largest = max(largest, _cuda_moe(config, itemsize, tokens))
    # residual, normed input, mixer output, their gated sum; shift, scale and gate of a layer, and their temporaries
    residuals = 4 * tokens * config.hidden_size * itemsize
    return residuals + 4 * forward.rows * 3 * config.hidden_size * itemsize + largest


def _cuda_attention(config: TwoTowerConfig, itemsize: int, tokens: int) -> int:
    """Return an upper limit of the bytes that an attention layer needs on a GPU."""
    # q, k, v and the output
    projected = tokens * itemsize * 2 * (config.attention_inner + config.kv_inner)
    # partial results of split contexts (see attention_plan.Room.of): a float32 sum, the best score, the sum of weights
    partial = 2 * PROGRAMS * TILE_QUERIES * 4 * (max(MIN_QUERIES, power_of_two(config.head_dim)) + 2)
    return projected + partial


def _cuda_moe(config: TwoTowerConfig, itemsize: int, tokens: int) -> int:
    """Return an upper limit of the bytes that a MoE layer needs on a GPU."""
    hidden, experts, chosen = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    router = 8 * tokens * (hidden + experts)  # float64
    # inputs and hidden values of each token's experts, or hidden values and outputs; then ids, places and weights
    routed = tokens * chosen * (itemsize * (hidden + config.moe_intermediate_size) + 32)
    shared = tokens * itemsize * config.moe_shared_expert_intermediate_size
    return max(router, routed + tokens * hidden * itemsize, shared + 2 * tokens * hidden * itemsize)


def graph_bytes(config: TwoTowerConfig, itemsize: int, layers: range, forward: Forward) -> int:
    """Return an upper limit of the bytes that the CUDA graphs of a stage keep: their memory pool, and a buffer of
    hidden states for each block length that is a power of two (model.engine.cuda_graphs). forward: the largest forward
    over blocks."""
    buffers = 2 * forward.tokens * config.hidden_size * itemsize
    return buffers + cuda_forward_bytes(config, itemsize, layers, forward)
