"""The kernels of a GPU: Triton's where the plain ones would launch many, cuBLAS for products.

Unlike the plain ones on a CPU they do not give a row the same bits in any company: cuBLAS chooses its algorithm by the
number of tokens, and attention splits long contexts by what else there is to do.
"""

import torch.nn.functional as F
from torch import Tensor

from model.kernels.plain import PlainKernels
from model.kernels.protocol import HEAD_WORKSPACE, ScanWeights
from model.kernels.triton import attention, norm, sampling, scan
from model.kernels.triton import experts as triton_experts
from model.kernels.triton.prefill_scan import prefill_scan_of_mamba_ssm, scan_prompts
from model.runtime.ragged_batch import RaggedBatch

BLOCK = 32
"""Tokens up to which a row is a block, scanned by one program a part of a head; longer ones are prompts, for which
mamba-ssm computes all chunks at once, where it is installed."""


class CudaKernels(PlainKernels):
    """See `model.kernels.protocol.Kernels`."""

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

    def __init__(self) -> None:
        self._prefill_scan = prefill_scan_of_mamba_ssm()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def mamba_scan(
        self,
        xbc: Tensor,
        dt: Tensor,
        weights: ScanWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        rows: RaggedBatch,
        *,
        store: bool,
    ) -> Tensor:
        if self._prefill_scan is None or max(rows.lengths) <= BLOCK:
            return scan.mamba_scan(xbc, dt, weights, conv_states, ssm_states, rows, store=store)
        return super().mamba_scan(xbc, dt, weights, conv_states, ssm_states, rows, store=store)

    def _scan(
        self,
        xbc: Tensor,
        dt: Tensor,
        weights: ScanWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        rows: RaggedBatch,
        *,
        store: bool,
    ) -> Tensor:
        """Rows of like length: the blocks of a forward that reads prompts as well are still blocks."""
        if max(rows.lengths) <= BLOCK:
            return scan.mamba_scan(xbc, dt, weights, conv_states, ssm_states, rows, store=store)
        return super()._scan(xbc, dt, weights, conv_states, ssm_states, rows, store=store)

    def selective_scan(
        self, x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self._prefill_scan is not None
        return scan_prompts(self._prefill_scan, x, dt, decay, B, C, states)
