"""Choose the kernels of a device: one protocol (model.kernels.protocol), its implementations chosen once at start."""

import torch

from model.errors import RequestError
from model.kernels.protocol import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The kernels that run on `device`: Triton's on a GPU, plain torch elsewhere.

    Raises RequestError where Triton is missing on a machine with a GPU.
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
