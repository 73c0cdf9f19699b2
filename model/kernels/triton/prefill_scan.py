"""Scans whole prompts with mamba-ssm's Triton kernels (arXiv 2405.21060), if that package is installed.

The kernels take one sequence per row, padded on the right; a token with dt 0 does not change the state. They give wrong
states, without an error, for packed sequences with initial states, and they keep the states between chunks in the dtype
of C. So rows are padded here, and everything is float32. By default Triton would compute float32 products in
TensorFloat-32, which is less accurate than model.checks.kernels allows (2e-5). An environment variable, set before the
kernels are compiled, prevents this.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

CHUNK = 128  # tokens that the kernels scan as one chunk: chunk_size of the released config.json
Scan = Callable[..., tuple[Tensor, ...]]


@cache
def prefill_scan_of_mamba_ssm() -> Scan | None:
    """Import mamba-ssm and return its forward scan, or None if the package, Triton or einops is missing.

    The package's own __init__ needs a compiled extension, which the Triton files do not need. If __init__ cannot be
    imported, the Triton files are imported without it.
    """
    try:
        spec = find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            return None
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        try:
            import_module("mamba_ssm")
        except ImportError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
                del sys.modules[name]
            hollow = ModuleType("mamba_ssm")
            hollow.__path__ = list(spec.submodule_search_locations)
            hollow.__spec__ = spec  # without it, later calls of find_spec() raise, such as the one in doctor
            sys.modules["mamba_ssm"] = hollow
        scan: Scan = import_module("mamba_ssm.ops.triton.ssd_combined")._mamba_chunk_scan_combined_fwd
        return scan
    except ImportError:
        return None


def scan_prompts(
    x: Tensor,  # (R, L, heads, head_dim) float32
    dt: Tensor,  # (R, L, heads) float32 after softplus, 0 at padding
    decay: Tensor,  # (heads,) float32
    B: Tensor,  # (R, L, groups, state) float32
    C: Tensor,  # (R, L, groups, state) float32
    states: Tensor,  # (R, heads, head_dim, state) float32
) -> tuple[Tensor, Tensor]:
    """Compute `model.kernels.plain.selective_scan` -> (y (R, L, heads, head_dim), the last states).

    The caller adds D x. Raises AssertionError if mamba-ssm cannot be imported.
    """
    scan = prefill_scan_of_mamba_ssm()
    assert scan is not None, "mamba-ssm cannot be imported"
    out, _, _, _, _, last, *_ = scan(x, dt, decay, B, C, CHUNK, initial_states=states)
    return out, last.to(torch.float32)
