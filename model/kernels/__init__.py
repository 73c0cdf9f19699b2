"""Chooses the implementation of the kernel protocol (model.kernels.protocol) for a device, when a model is built."""

import torch

from model.errors import RequestError
from model.kernels.protocol import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """Return the kernels for `device`: the Triton kernels on a GPU, plain torch elsewhere.

    Raises RequestError if the device is a GPU and Triton cannot be imported.
    """
    if device.type == "cuda":
        return _cuda_kernels()
    from model.kernels.plain import PlainKernels

    return PlainKernels()


def _cuda_kernels() -> Kernels:
    try:
        from model.kernels.triton.kernels import CudaKernels
    except ImportError as error:
        raise RequestError(f"a GPU needs Triton, which cannot be imported ({error}); pip install triton") from error
    return CudaKernels()
