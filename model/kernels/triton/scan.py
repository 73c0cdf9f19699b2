"""Computes the Mamba-2 scan on a GPU in Triton, for rows of any length; it is made for blocks and single tokens.

`mamba_scan` implements `Kernels.mamba_scan` with two kernels:
- convolution and SiLU of all channels, in float32. A program computes some channels of a row. It is the only one that
  reads them from the row's window (its last conv inputs) and, if store, writes them there;
- the scan. A program computes some channels of a head of a row and goes through the row's tokens in chunks (Mamba-2,
  arXiv 2405.21060, section 6). A block is one chunk, so the state is read once and, if it is stored, written once. If
  every row has one token (AR), a kernel without matrix products does the same.

Reading and writing the states, 2 MiB per row and layer in the released model, limits the speed. Everything inside is
float32. Every decay is the exponential of a sum of terms that are at most 0, and no term is ever subtracted again, so
nothing overflows and strong decays cost no precision. Rows of length 0 pad a captured forward; nothing is read or
written for them.

Shapes: R rows, N tokens, M heads of D channels, G groups, S states, K taps of the convolution over
conv_dim = M D + 2 G S channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.protocol import ScanInputs

PRECISION = "tf32x3"
"""Precision of products: three products in TensorFloat-32 replace one in float32 and are nearly as accurate. A single
one ("tf32") is less accurate than model.checks.kernels allows; "ieee" uses no tensor cores and many more
instructions."""
MIN_CHUNK = 16  # tokens; tl.dot accepts no fewer
MAX_CHUNK = 32  # for rows longer than MIN_CHUNK
MAX_PART = 64  # limit of the channels of a head that one program computes
MIN_PART = 16
FEW_PROGRAMS = 512  # with fewer rows x heads (under 4 per multiprocessor of an H200), parts have MIN_PART channels
STATE_TILE = 32  # columns of a state in registers at once: one line of memory
STAGES = 3  # tiles of states that are loaded at the same time
CONV_CHANNELS = 128  # channels per program


def mamba_scan(inputs: ScanInputs) -> Tensor:
    """Implement `model.kernels.protocol.Kernels.mamba_scan` -> (N, M D) float32.

    The results of tokens that belong to no row are left uninitialised.
    """
    xbc, dt, weights, windows, states = inputs.xbc, inputs.dt, inputs.weights, inputs.conv_states, inputs.ssm_states
    out = torch.empty(len(xbc), states.shape[1] * states.shape[2], device=xbc.device)
    longest = max(inputs.rows.lengths, default=0)
    if not longest:
        return out
    assert xbc.stride(1) == dt.stride(1) == 1, f"channels lie apart: strides {xbc.stride()}, {dt.stride()}"
    assert windows.is_contiguous(), f"windows lie apart: strides {windows.stride()}"
    assert states.is_contiguous(), f"states lie apart: strides {states.stride()}"
    chunk = 1 if longest == 1 else MIN_CHUNK if longest <= MIN_CHUNK else MAX_CHUNK
    channels, taps = windows.shape[1:]
    mixed = torch.empty(len(xbc), channels, device=xbc.device)
    index = inputs.rows.on(xbc.device)
    places = index.slots, index.seeds, index.starts, index.lengths
    weight, bias, block_k = weights.conv_weight.contiguous(), weights.conv_bias, triton.next_power_of_2(taps)
    grid = triton.cdiv(channels, CONV_CHANNELS), len(inputs.rows.lengths)
    with torch.cuda.device_of(xbc):  # Triton launches on the current device, not on that of its arguments
        _conv_kernel[grid](
            *(xbc, mixed, windows, weight, bias, *places),
            *(xbc.stride(0), channels, taps, block_k, chunk, CONV_CHANNELS, inputs.store),
        )
        _scan(inputs, mixed, out, places, chunk, longest)
    return out


def _scan(
    inputs: ScanInputs,
    mixed: Tensor,  # (N, conv_dim) float32, after the convolution
    out: Tensor,  # (N, M D) float32
    places: tuple[Tensor, ...],  # slots, seeds, starts, lengths
    chunk: int,
    longest: int,
) -> None:
    """Launch the kernel that scans `mixed` into `out` and, if `inputs.store`, updates the states."""
    dt, weights, states, store = inputs.dt, inputs.weights, inputs.ssm_states, inputs.store
    count, (heads, head_dim, state) = len(places[0]), states.shape[1:]
    part = max(MIN_PART, min(MAX_PART, triton.next_power_of_2(head_dim)))
    part = MIN_PART if count * heads < FEW_PROGRAMS else part
    padded = max(MIN_PART, triton.next_power_of_2(state))
    grid = heads * triton.cdiv(head_dim, part), count
    numbers = weights.decay, weights.dt_bias, weights.D, dt.stride(0), *weights.dt_limit
    sizes = heads, weights.groups, head_dim, state, part
    if chunk == 1:
        _step_kernel[grid](mixed, dt, out, states, *places, *numbers, *sizes, padded, store)
        return
    kept, carry = states, store or longest > chunk
    if carry and not store:  # the states between chunks need memory of their own
        kept = torch.empty(count, *states.shape[1:], device=states.device)
        places = torch.arange(count, device=states.device), *places[1:]
    _scan_kernel[grid](
        *(mixed, dt, out, states, kept, *places, *numbers, *sizes),
        *(min(STATE_TILE, padded), chunk, carry, STAGES, PRECISION),
        num_warps=chunk // 4,
    )


@triton.jit
def _convolve(
    tokens: tl.tensor,  # the row's first token
    stride: int,
    window: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    place: tl.tensor,
    length: tl.tensor,
    channel: tl.tensor,
    channels: int,
    seeded: tl.tensor,
    TAPS: tl.constexpr,
    HISTORY: tl.constexpr,
) -> None:
    """Store the SiLU of the causal convolution for the tokens `place` of the row and the channels `channel`.

    If HISTORY, inputs before the row's first token are read from the window, or are 0 if the row is not seeded.
    """
    real = channel < channels
    mine = real & (place < length)
    mixed = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):  # the last tap belongs to the current token
        at = place + (tap + 1 - TAPS)
        taken = tl.load(tokens + at * stride + channel, mask=mine & (at >= 0), other=0.0).to(tl.float32)
        if HISTORY:
            before = mine & (at < 0) & seeded
            taken += tl.load(window + channel * TAPS + (TAPS + at), mask=before, other=0.0).to(tl.float32)
        mixed += taken * tl.load(weight + channel * TAPS + tap, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place * channels + channel, mixed / (1.0 + tl.exp(-mixed)), mask=mine)


@triton.jit
def _conv_kernel(
    xbc: tl.tensor,
    out: tl.tensor,  # (N, conv_dim) float32
    windows: tl.tensor,  # (slots, conv_dim, TAPS)
    weight: tl.tensor,
    bias: tl.tensor,
    slots: tl.tensor,
    seeds: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    stride: int,
    channels: int,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STORE: tl.constexpr,
) -> None:
    """Compute some channels of a row: SiLU of the causal convolution of all its tokens; if STORE, the new window."""
    HEAD: tl.constexpr = min(BLOCK_K, CHUNK)
    row = tl.program_id(1)
    start, length, seed = tl.load(starts + row), tl.load(lengths + row), tl.load(seeds + row)
    seeded = tl.full([1, 1], 0, tl.int64) <= seed  # a tensor, like all masks; see _scan_kernel
    tokens, window = xbc + start * stride, windows + seed * channels * TAPS
    out += start * channels
    channel = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    head = tl.arange(0, HEAD)[:, None].to(tl.int64)
    _convolve(tokens, stride, window, weight, bias, out, head, length, channel, channels, seeded, TAPS, True)
    for first in range(HEAD, length, CHUNK):
        place = (first + tl.arange(0, CHUNK)[:, None]).to(tl.int64)
        _convolve(tokens, stride, window, weight, bias, out, place, length, channel, channels, seeded, TAPS, False)
    if STORE:
        of = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
        at = length - TAPS + tl.arange(0, BLOCK_K)[None, :]
        kept = (of < channels) & (at < length) & (tl.full([1, 1], 0, tl.int64) < length)
        token = tl.load(tokens + at * stride + of, mask=kept & (at >= 0), other=0.0)
        old = tl.load(window + of * TAPS + (TAPS + at), mask=kept & (at < 0) & seeded, other=0.0)
        tl.debug_barrier()  # the seed may be the slot itself: all threads must read before any writes
        own = windows + tl.load(slots + row) * channels * TAPS
        tl.store(own + of * TAPS + (TAPS - length + at), tl.where(at >= 0, token, old), mask=kept)


@triton.jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """Return log(1 + exp(x)), with full precision even if the result is small and 1 + exp(x) would lose digits."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)  # log(1 + e) = 2 artanh(z), z at most 1/3: eight terms of its series
    w = z * z
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def _scan_kernel(
    mixed: tl.tensor,  # (N, conv_dim) float32
    dt: tl.tensor,
    out: tl.tensor,
    states: tl.tensor,  # (slots, M, D, S) float32
    kept: tl.tensor,  # receives the states after each chunk, at `slots`
    slots: tl.tensor,
    seeds: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    decays: tl.tensor,
    dt_bias: tl.tensor,
    skips: tl.tensor,
    dt_stride: int,
    dt_min: float,
    dt_max: float,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    CARRY: tl.constexpr,  # the states after each chunk are needed
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Scan BLOCK_D channels of a head of a row, chunk by chunk, from the state in the row's seed, or from zeros."""
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    WIDTH: tl.constexpr = HEADS * HEAD_DIM + 2 * GROUPS * STATE
    head, row = tl.program_id(0) // PARTS, tl.program_id(1)
    start, length, seed = tl.load(starts + row), tl.load(lengths + row), tl.load(seeds + row)
    decay, skip, bias = tl.load(decays + head), tl.load(skips + head), tl.load(dt_bias + head)
    d = (tl.program_id(0) % PARTS) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = head * HEAD_DIM + d
    group = head // (HEADS // GROUPS)
    i = tl.arange(0, CHUNK)
    later = i[:, None] > i[None, :]
    source, target = states + seed * (HEADS * HEAD_DIM * STATE), kept
    if CARRY:
        target = kept + tl.load(slots + row) * (HEADS * HEAD_DIM * STATE)
    for first in range(0, length, CHUNK):
        place = first + i
        mine = place < length
        token = start + place
        own = mine[:, None] & (d < HEAD_DIM)[None, :]
        x = tl.load(mixed + token[:, None] * WIDTH + channel[None, :], mask=own, other=0.0)
        step = _softplus(tl.load(dt + token * dt_stride + head, mask=mine, other=0.0).to(tl.float32) + bias)
        step = tl.where(mine, tl.minimum(tl.maximum(step, dt_min), dt_max), 0.0)  # 0 keeps the state
        fall = step * decay  # logarithm of the decay at each token
        between = tl.where(later, fall[:, None], 0.0)
        dx = x * step[:, None]
        if CARRY:
            ending = tl.trans(dx * tl.exp(tl.sum(between, axis=0))[:, None])
            through = tl.exp(tl.sum(fall, axis=0))
        full = tl.full([1, 1], 0, tl.int64) <= seed  # a tensor: the interpreter turns a scalar bool into a number
        seen = tl.zeros([CHUNK, CHUNK], tl.float32)  # C of token i times B of token j
        y = tl.zeros([CHUNK, BLOCK_D], tl.float32)
        for column in tl.range(0, STATE, BLOCK_S, num_stages=STAGES):
            s = column + tl.arange(0, BLOCK_S)
            cell = channel[:, None] * STATE + s[None, :]
            real = (d < HEAD_DIM)[:, None] & (s < STATE)[None, :]
            b_cell = token[:, None] * WIDTH + (HEADS * HEAD_DIM + group * STATE + s)[None, :]
            given = mine[:, None] & (s < STATE)[None, :]
            h = tl.load(source + cell, mask=real & full, other=0.0)
            B = tl.load(mixed + b_cell, mask=given, other=0.0)
            C = tl.load(mixed + b_cell + GROUPS * STATE, mask=given, other=0.0)
            seen = tl.dot(C, tl.trans(B), seen, input_precision=PRECISION)
            y = tl.dot(C, tl.trans(h), y, input_precision=PRECISION)
            if CARRY:
                h = tl.dot(ending, B, h * through, input_precision=PRECISION)
                tl.store(target + cell, h, mask=real)
        mix = tl.where(i[:, None] >= i[None, :], seen * tl.exp(tl.cumsum(between, axis=0)), 0.0)
        y = tl.dot(mix, dx, y * tl.exp(tl.cumsum(fall, axis=0))[:, None], input_precision=PRECISION)
        tl.store(out + token[:, None] * (HEADS * HEAD_DIM) + channel[None, :], y + skip * x, mask=own)
        if CARRY:
            source, seed = target, tl.maximum(seed, 0)
            tl.debug_barrier()  # the next chunk reads what other threads have stored


@triton.jit
def _step_kernel(
    mixed: tl.tensor,
    dt: tl.tensor,
    out: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    seeds: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    decays: tl.tensor,
    dt_bias: tl.tensor,
    skips: tl.tensor,
    dt_stride: int,
    dt_min: float,
    dt_max: float,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STORE: tl.constexpr,
) -> None:
    """Scan BLOCK_D channels of a head of a row with one token or none; if STORE, write the new state to its slot."""
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    head, row = tl.program_id(0) // PARTS, tl.program_id(1)
    start, length, seed = tl.load(starts + row), tl.load(lengths + row), tl.load(seeds + row)
    d = (tl.program_id(0) % PARTS) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    some = tl.full([1], 0, tl.int64) < length
    real_d, real_s = (d < HEAD_DIM) & some, (s < STATE) & some
    channel = head * HEAD_DIM + d
    cell = channel[:, None] * STATE + s[None, :]
    real = real_d[:, None] & real_s[None, :]
    full = tl.full([1, 1], 0, tl.int64) <= seed
    h = tl.load(states + seed * (HEADS * HEAD_DIM * STATE) + cell, mask=real & full, other=0.0)
    token = mixed + start * (HEADS * HEAD_DIM + 2 * GROUPS * STATE)
    b_of = HEADS * HEAD_DIM + head // (HEADS // GROUPS) * STATE + s
    x = tl.load(token + channel, mask=real_d, other=0.0)
    B = tl.load(token + b_of, mask=real_s, other=0.0)
    C = tl.load(token + b_of + GROUPS * STATE, mask=real_s, other=0.0)
    step = tl.load(dt + start * dt_stride + head, mask=length > 0, other=0.0).to(tl.float32) + tl.load(dt_bias + head)
    step = tl.minimum(tl.maximum(_softplus(step), dt_min), dt_max)
    h = h * tl.exp(step * tl.load(decays + head)) + (step * x)[:, None] * B[None, :]
    y = tl.sum(h * C[None, :], axis=1) + tl.load(skips + head) * x
    tl.store(out + start * (HEADS * HEAD_DIM) + channel, y, mask=real_d)
    if STORE:
        tl.store(states + tl.load(slots + row) * (HEADS * HEAD_DIM * STATE) + cell, h, mask=real)
