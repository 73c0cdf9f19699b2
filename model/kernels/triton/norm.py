"""Computes norms on a GPU in Triton, together with the operations that the layers do right before and after them.

Everything is computed in float32 and rounded once. Shapes: N tokens, R rows, H hidden size; conditioning (R, 3, H) is
shift, scale and gate of each row, see model.network.layers.time; row_of_token (N,) is the row of each token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS_PER_WARP = 512
MAX_WARPS = 8
ADD_CHANNELS = 1024  # channels per program


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return norm(y * silu(gate)) over each group, as `model.kernels.formulas.gated_group_norm` does.

    y, gate (N, inner) with any stride between tokens, weight (inner,) -> (N, inner) in the gate's dtype.
    """
    tokens, inner = gate.shape
    out = torch.empty(tokens, inner, dtype=gate.dtype, device=gate.device)
    size = inner // groups
    block = triton.next_power_of_2(size)
    if tokens:
        strides = _stride(y), _stride(gate)
        with torch.cuda.device_of(y):  # Triton launches on the current device, not on that of its arguments
            _gated_kernel[tokens, groups](
                *(y, gate, weight, out, *strides, inner, eps, size, block), num_warps=_warps(block)
            )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of x (…, H) with weight (H,) in the shape and dtype of x, as `model.kernels.formulas.rms_norm`
    does."""
    flat = x.reshape(-1, x.shape[-1])
    return _norm(flat, weight, eps, None, None, norm_first=True).view(x.shape)


def modulated_norm(
    x: Tensor, weight: Tensor, eps: float, conditioning: Tensor, row_of_token: Tensor, *, norm_first: bool
) -> Tensor:
    """Return norm(modulate(x, shift, scale)), or modulate(norm(x), shift, scale) if norm_first: x (N, H) -> (N, H).

    shift and scale are those of each token's row in `conditioning`.
    """
    return _norm(x, weight, eps, conditioning, row_of_token, norm_first=norm_first)


def gated_add(x: Tensor, mixed: Tensor, conditioning: Tensor, row_of_token: Tensor) -> Tensor:
    """Return x + gate * mixed, with the gate conditioning[:, 2] of each token's row: x, mixed (N, H) -> (N, H)."""
    tokens, size = x.shape
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    if tokens:
        grid = tokens, triton.cdiv(size, ADD_CHANNELS)
        rows = _rows(conditioning), row_of_token
        with torch.cuda.device_of(x):
            _add_kernel[grid](x, mixed, *rows, out, _stride(x), _stride(mixed), size, ADD_CHANNELS)
    return out


def _norm(
    x: Tensor, weight: Tensor, eps: float, conditioning: Tensor | None, row_of_token: Tensor | None, *, norm_first: bool
) -> Tensor:
    tokens, size = x.shape
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    if tokens:
        # without conditioning the kernel does not read these two arguments
        rows = (weight, weight) if conditioning is None else (_rows(conditioning), row_of_token)
        flags = conditioning is not None, norm_first
        with torch.cuda.device_of(x):
            _norm_kernel[(tokens,)](
                *(x, weight, *rows, out, _stride(x), eps, size, *flags, block), num_warps=_warps(block)
            )
    return out


def _stride(x: Tensor) -> int:
    assert x.stride(1) == 1, f"channels lie apart: strides {x.stride()}"
    return x.stride(0)


def _rows(conditioning: Tensor) -> Tensor:
    assert conditioning.is_contiguous(), f"shift, scale and gate lie apart: strides {conditioning.stride()}"
    return conditioning


def _warps(block: int) -> int:
    return max(1, min(MAX_WARPS, block // CHANNELS_PER_WARP))


@triton.jit
def _gated_kernel(
    y: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    y_stride: int,
    gate_stride: int,
    inner: int,
    eps: float,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Multiply one group of channels of one token by silu(gate) and normalise it."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real, channel = i < SIZE, tl.program_id(1) * SIZE + i
    by = tl.load(gate + token * gate_stride + channel, mask=real, other=0.0).to(tl.float32)
    gated = tl.load(y + token * y_stride + channel, mask=real, other=0.0).to(tl.float32) * (by / (1.0 + tl.exp(-by)))
    normed = gated * tl.rsqrt(tl.sum(gated * gated) / SIZE + eps)
    tl.store(out + token * inner + channel, normed * tl.load(weight + channel, mask=real, other=0.0), mask=real)


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    conditioning: tl.tensor,
    row_of_token: tl.tensor,
    out: tl.tensor,
    stride: int,
    eps: float,
    SIZE: tl.constexpr,
    MODULATE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalise one token. If MODULATE, apply shift and scale before that, or after it if NORM_FIRST."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real = i < SIZE
    value = tl.load(x + token * stride + i, mask=real, other=0.0).to(tl.float32)
    if MODULATE:
        row = conditioning + tl.load(row_of_token + token) * (3 * SIZE) + i
        shift = tl.load(row, mask=real, other=0.0).to(tl.float32)
        scale = tl.load(row + SIZE, mask=real, other=0.0).to(tl.float32)
        if not NORM_FIRST:
            value = value * (1.0 + scale) + shift
    value = value * tl.rsqrt(tl.sum(value * value) / SIZE + eps) * tl.load(weight + i, mask=real, other=0.0)
    if MODULATE and NORM_FIRST:
        value = value * (1.0 + scale) + shift
    tl.store(out + token * SIZE + i, value, mask=real)


@triton.jit
def _add_kernel(
    x: tl.tensor,
    mixed: tl.tensor,
    conditioning: tl.tensor,
    row_of_token: tl.tensor,
    out: tl.tensor,
    x_stride: int,
    mixed_stride: int,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute x + gate * mixed for BLOCK channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = i < SIZE
    gate = tl.load(conditioning + (tl.load(row_of_token + token) * 3 + 2) * SIZE + i, mask=real, other=0.0)
    value = tl.load(mixed + token * mixed_stride + i, mask=real, other=0.0).to(tl.float32) * gate.to(tl.float32)
    value += tl.load(x + token * x_stride + i, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * SIZE + i, value, mask=real)
