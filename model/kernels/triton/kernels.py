"""Implements the kernels for a GPU: Triton if plain torch would launch many kernels, and cuBLAS for linear layers. The
experts use torch's grouped product if it is fast, and prompts are scanned by mamba-ssm if it is installed.

Unlike the plain kernels on a CPU, they may give a row other bits if other rows are computed with it: cuBLAS chooses its
algorithm by the number of tokens, and attention splits long contexts depending on the rest of the forward.
"""

import torch.nn.functional as F
from torch import Tensor

from model.kernels.plain import PlainKernels
from model.kernels.protocol import HEAD_WORKSPACE, ScanInputs
from model.kernels.triton import attention, norm, sampling, scan
from model.kernels.triton import experts as triton_experts
from model.kernels.triton.prefill_scan import prefill_scan_of_mamba_ssm, scan_prompts

BLOCK = 32
"""Largest number of tokens of a row that is scanned as a block, by one program per part of a head. Longer rows are
prompts; mamba-ssm scans all of their chunks at once, if it is installed."""


class CudaKernels(PlainKernels):
    """The kernels of a GPU; `model.kernels.protocol.Kernels` describes the methods."""

    rms_norm = staticmethod(norm.rms_norm)
    modulated_norm = staticmethod(norm.modulated_norm)
    gated_add = staticmethod(norm.gated_add)
    gated_norm = staticmethod(norm.gated_norm)
    attend = staticmethod(attention.attend)
    choose_experts = staticmethod(triton_experts.choose_experts)
    experts = staticmethod(triton_experts.grouped_experts)
    squared_relu = staticmethod(triton_experts.squared_relu_)
    head_workspace = HEAD_WORKSPACE["cuda"]
    vocab_slice = sampling.SLICE
    uniforms = staticmethod(sampling.uniforms)
    choose_tokens = staticmethod(sampling.choose_tokens)
    recurrence = staticmethod(scan_prompts)

    def __init__(self) -> None:
        self._prefill_scan = prefill_scan_of_mamba_ssm()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def mamba_scan(self, inputs: ScanInputs) -> Tensor:
        """Implement `Kernels.mamba_scan`: with the kernels for blocks, or with mamba-ssm if a row is longer than BLOCK.

        Without mamba-ssm, the kernels for blocks scan all rows.
        """
        if self._prefill_scan is None or max(inputs.rows.lengths) <= BLOCK:
            return scan.mamba_scan(inputs)
        return super().mamba_scan(inputs)

    def _scan(self, inputs: ScanInputs) -> Tensor:
        """Scan rows of similar length: with the kernels for blocks if none is longer than BLOCK, which is so for blocks
        that share a forward with prompts; otherwise with mamba-ssm."""
        if max(inputs.rows.lengths) <= BLOCK:
            return scan.mamba_scan(inputs)
        return super()._scan(inputs)
