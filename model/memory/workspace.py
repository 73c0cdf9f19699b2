"""How many bytes one forward needs beside weights and context cache: its largest temporaries, layer kind by layer kind.

Estimates from above of what `model.layers` hold at once, with `model.kernels.plain` and with those of a GPU. Measured
peaks of both lie below (tests/model/memory/test_planner.py; the GPU's kernels under Triton's interpreter).
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
    """The largest forward of its sort."""

    tokens: int
    """N, padding counted."""
    rows: int
    queries: int
    """Of one row whose attention is computed at once, each with a mask of its own over the context."""


def causal_queries(device_type: str) -> int:
    """Tokens of a prompt whose attention over the context is computed at once."""
    return PAGE_SIZE if device_type == "cpu" else max(PAGE_SIZE, QUERIES)


def plain_forward_bytes(config: TwoTowerConfig, itemsize: int, layers: range, forward: Forward, context: int) -> int:
    """Bytes at most that a forward of one stage's `layers`, of either tower, needs while it runs on a CPU.

    itemsize: bytes of a number in the model's dtype. context: tokens of the longest row.
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
    # residual, normed input, mixer output and its gated copy; shift, scale and gate; a norm's float32 copies
    residuals = 7 * hidden * itemsize + 2 * hidden * 4
    # the denoiser's conditioning, made for all layers of the stage at once
    time = (len(layers) + 1) * forward.rows * 3 * config.hidden_size * itemsize
    return residuals + time + largest


def _mamba(config: TwoTowerConfig, itemsize: int, forward: Forward) -> int:
    conv, inner, heads = config.conv_dim, config.mamba_inner, config.mamba_num_heads
    padded = forward.tokens + forward.rows * (SCAN_CHUNK - 1)
    # in_proj's output, the conv inputs twice; in float32 the conv's terms or the scan's inputs, and the scan's outputs
    a_token = itemsize * (config.in_proj_size + 2 * conv) + 4 * (3 * conv + 3 * inner + 4 * heads)
    state = inner * config.ssm_state_size
    together = min(-(-padded // SCAN_CHUNK), max(forward.rows, SCAN_ELEMENTS // state))  # chunks computed at once
    # decays and products between the tokens of a chunk, its x, B and C scaled and in other orders, its outputs
    mixed = 4 * heads * SCAN_CHUNK + 7 * inner + 3 * config.n_groups * config.ssm_state_size
    # states before each chunk, what each adds, all before in one tensor; those gathered, and the last
    states = 3 * together * state + 2 * forward.rows * state
    history = 2 * forward.rows * conv * config.conv_kernel * itemsize
    return padded * a_token + 4 * (together * SCAN_CHUNK * mixed + states) + history


def _attention(config: TwoTowerConfig, itemsize: int, forward: Forward, context: int) -> int:
    query, kv = config.attention_inner, config.kv_inner
    # q, k, v, k and v again, the output; and for queries padded to a power of two: picked, in order, out, in order
    projected = forward.tokens * itemsize * (10 * query + 6 * kv)
    # of one row no two pieces have equally many keys, so that they are not computed together
    gathered = min(max(MAX_GATHERED, context), forward.rows * pages_for(context) * PAGE_SIZE)
    repeat = config.num_attention_heads // config.num_key_value_heads
    mask = gathered * forward.queries * repeat * (itemsize + 1)
    return projected + gathered * (2 * kv * itemsize + 4 * 8) + mask  # 8: index tensors


def _moe(config: TwoTowerConfig, itemsize: int, tokens: int) -> int:
    hidden, experts, chosen = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    router = 8 * (tokens * (hidden + 4 * experts) + experts * hidden)  # float64
    pairs = tokens * chosen + min(experts, tokens * chosen) * MIN_GEMM_ROWS  # each expert's few rows are padded
    outputs = pairs * hidden * itemsize
    one = tokens * itemsize * (hidden + 3 * config.moe_intermediate_size)  # an expert that every token chooses
    # expert inputs and outputs, these end to end and in the tokens' order, and weighed
    routed = max(2 * outputs + one, 3 * outputs) + 6 * 8 * pairs
    shared = tokens * itemsize * (hidden + 3 * config.moe_shared_expert_intermediate_size)
    return max(router, routed, shared)


def cuda_forward_bytes(
    config: TwoTowerConfig, itemsize: int, layers: range, forward: Forward, prompts: Forward | None = None
) -> int:
    """The same on a GPU, for a forward that reads `prompts` beside its blocks; the context's length changes nothing.

    Mamba layers scan prompts with mamba-ssm, padded to their longest, as the plain kernels do.
    """
    kinds = {config.layer_kinds[i] for i in layers}
    tokens, largest = forward.tokens, 0
    if "mamba" in kinds:
        # in_proj's output; in float32 what the convolution gives, and the scan; gated and normalised
        largest = tokens * (itemsize * (config.in_proj_size + config.mamba_inner))
        largest += tokens * 4 * (config.conv_dim + config.mamba_inner)
        largest += _mamba(config, itemsize, prompts) if prompts else 0
    if "attention" in kinds:
        largest = max(largest, _cuda_attention(config, itemsize, tokens))
    if "moe" in kinds:
        largest = max(largest, _cuda_moe(config, itemsize, tokens))
    # residual, normed input, mixer output, their gated sum; shift, scale and gate of a layer, and what they are made of
    residuals = 4 * tokens * config.hidden_size * itemsize
    return residuals + 4 * forward.rows * 3 * config.hidden_size * itemsize + largest


def _cuda_attention(config: TwoTowerConfig, itemsize: int, tokens: int) -> int:
    # q, k, v and the output
    projected = tokens * itemsize * 2 * (config.attention_inner + config.kv_inner)
    # of contexts that are split (kernels.paged.Room.of): a sum in float32, the best score and the weights' sum
    partial = 2 * PROGRAMS * TILE_QUERIES * 4 * (max(MIN_QUERIES, power_of_two(config.head_dim)) + 2)
    return projected + partial


def _cuda_moe(config: TwoTowerConfig, itemsize: int, tokens: int) -> int:
    hidden, experts, chosen = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    router = 8 * tokens * (hidden + experts)  # float64
    # inputs and hidden values of each token's experts, or these and outputs; then which, where and by what weight
    routed = tokens * chosen * (itemsize * (hidden + config.moe_intermediate_size) + 32)
    shared = tokens * itemsize * config.moe_shared_expert_intermediate_size
    return max(router, routed + tokens * hidden * itemsize, shared + 2 * tokens * hidden * itemsize)


def graph_bytes(config: TwoTowerConfig, itemsize: int, layers: range, forward: Forward) -> int:
    """What the CUDA graphs of a stage keep for its largest forward of blocks: their pool, and hidden states in and out
    for blocks of each power of two (model.engine.cuda_graphs)."""
    buffers = 2 * forward.tokens * config.hidden_size * itemsize
    return buffers + cuda_forward_bytes(config, itemsize, layers, forward)
