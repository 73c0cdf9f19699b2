"""Tests Triton's norms against the plain ones, on a GPU or in the interpreter."""

import pytest
import torch
from torch import Tensor

from model.kernels.formulas import gated_group_norm, modulate, rms_norm
from model.kernels.triton import norm as triton_norm

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Allowed error, relative to the larger of a number and 1. The kernels round once, the plain path may round several
times."""
RELEASED = [2688, 4096] if DEVICE == "cuda" else []


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Check that the result is the float64 one, up to one rounding to its dtype."""
    rounding = ROUNDING[got.dtype]
    assert torch.allclose(got.double(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "size"), [(1, 96), (2, 48), (8, 512)])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_gated_norm(tokens: int, groups: int, size: int, dtype: torch.dtype) -> None:
    """The gated norm is right also if tokens are not adjacent in memory, and if there are none."""
    inner = groups * size
    y, gate, weight = normal(tokens, inner + 4)[:, 4:], normal(tokens, inner + 9, dtype=dtype)[:, :inner], normal(inner)
    got = triton_norm.gated_norm(y, gate, weight, groups, EPS)
    assert got.dtype == dtype
    wanted = gated_group_norm(y, gate.float(), weight, groups, EPS).double()
    assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 100, *RELEASED])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    """The RMS norm is right for any number of dimensions, and also if one of them is empty."""
    weight = normal(size)
    for shape in ((3, size), (2, 3, size), (0, size)):
        x = normal(*shape, dtype=dtype)
        got = triton_norm.rms_norm(x, weight, EPS)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        assert_close(got, rms_norm(x.float(), weight, EPS).double())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 100, *RELEASED])
def test_a_layer_of_the_denoiser(size: int, dtype: torch.dtype, *, norm_first: bool) -> None:
    """Each token gets the shift, scale and gate of its own row, in both orders of norm and modulation, and also if
    there are no tokens."""
    rows = torch.tensor([0, 0, 2, 1, 1], device=DEVICE)
    conditioning, weight = normal(3, 3, size, dtype=dtype), normal(size)
    shift, scale, gate = conditioning.float()[rows].unbind(1)
    x, mixed = normal(5, size, dtype=dtype), normal(5, size + 1, dtype=dtype)[:, 1:]
    wide = x.float()
    if norm_first:
        wanted = modulate(rms_norm(wide, weight, EPS), shift, scale)
    else:
        wanted = rms_norm(modulate(wide, shift, scale), weight, EPS)
    got = triton_norm.modulated_norm(x, weight, EPS, conditioning, rows, norm_first=norm_first)
    assert got.dtype == dtype
    assert_close(got, wanted.double())
    added = triton_norm.gated_add(x, mixed, conditioning, rows)
    assert added.dtype == dtype
    assert_close(added, (wide + gate * mixed.float()).double())
    nothing = x[:0]
    assert triton_norm.modulated_norm(nothing, weight, EPS, conditioning, rows[:0], norm_first=norm_first).shape == (
        0,
        size,
    )
    assert triton_norm.gated_add(nothing, mixed[:0], conditioning, rows[:0]).shape == (0, size)
