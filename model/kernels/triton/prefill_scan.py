"""The scan of whole prompts by mamba-ssm's Triton kernels (arXiv 2405.21060), where that package is installed.

Its kernels want one sequence a row, padded on the right; where dt is 0 the state passes through. Packed sequences with
initial states give wrong states in silence, and states between chunks take the dtype of C: so rows are padded here, and
everything is float32. Products of float32 would run in TensorFloat-32, which is off by 2.7e-4 (model.checks.kernels
allows 2e-5): Triton is told otherwise before it compiles them.
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

CHUNK = 128  # tokens; as the released config has it
Scan = Callable[..., tuple[Tensor, ...]]


@cache
def prefill_scan_of_mamba_ssm() -> Scan | None:
    """mamba-ssm's forward scan; None where the package, Triton or einops is missing.

    The package's own __init__ wants its compiled part, which the Triton files do without: where it fails to import,
    they are imported past it.
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
            hollow.__spec__ = spec  # without it find_spec() raises for whoever asks next, as doctor does
            sys.modules["mamba_ssm"] = hollow
        scan: Scan = import_module("mamba_ssm.ops.triton.ssd_combined")._mamba_chunk_scan_combined_fwd
        return scan
    except ImportError:
        return None


def scan_prompts(
    scan: Scan,
    x: Tensor,  # (R, L, heads, head_dim) float32
    dt: Tensor,  # (R, L, heads) float32 after softplus, 0 at padding
    decay: Tensor,  # (heads,) float32
    B: Tensor,  # (R, L, groups, state) float32
    C: Tensor,  # (R, L, groups, state) float32
    states: Tensor,  # (R, heads, head_dim, state) float32
) -> tuple[Tensor, Tensor]:
    """As `model.kernels.plain.selective_scan` -> (y (R, L, heads, head_dim), the last states), D left out."""
    out, _, _, _, _, last, *_ = scan(x, dt, decay, B, C, CHUNK, initial_states=states)
    return out, last.to(torch.float32)
