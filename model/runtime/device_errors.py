"""Tells device errors apart: the device is lost, or memory ran out. Does not import torch.

CUDA errors come in three forms: as torch.AcceleratorError, which carries CUDA's error number; as RuntimeError from
cuBLAS, cuDNN and Triton, which carries only a text; and as the cause of an EngineError. The numbers and texts here are
those of cudaError_t.
"""

import re
from collections.abc import Iterator

# errors after which every later CUDA call of the process fails, too
_LOST_CODES = frozenset((214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999))
_LOST_TEXT = re.compile(
    r"(CUDA (driver )?error|Triton Error \[CUDA\]): ("
    "uncorrectable ECC error"
    "|uncorrectable NVLink error"
    "|Invalid access of peer GPU memory"
    "|an illegal memory access"
    "|the launch timed out"
    "|device-side assert"
    "|hardware stack error"
    "|an illegal instruction"
    "|misaligned address"
    "|operation not supported on global/shared address space"
    "|invalid program counter"
    "|unspecified launch failure"
    "|unknown error"
    ")|(CUBLAS|CUDNN)_STATUS_EXECUTION_FAILED"
)
_NO_MEMORY_CODE = 2  # cudaErrorMemoryAllocation
# A library that cannot create its handle has no memory for its workspace. Triton's "out of resource" is not included: a
# program that needs more shared memory than the chip has needs just as much with fewer rows.
_NO_MEMORY_TEXT = re.compile(
    r"(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory"
    "|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    "|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create"
    "|CUDA out of memory"
    "|DefaultCPUAllocator"
)


def device_lost(error: BaseException) -> bool:
    """Return whether the error, or one that caused it or was being handled when it was raised, means that the process
    can no longer use its GPU.

    After such an error every later call fails, too, whatever it does and for whichever rows; only a new process helps.
    """
    return any(_is(each, _LOST_CODES, _LOST_TEXT) for each in _chain(error))


def out_of_memory(error: BaseException) -> bool:
    """Return whether torch, Triton or a CUDA library says with this error that memory of a device or of the host ran
    out, so that fewer rows may help.

    Only a RuntimeError can say so: Python's own MemoryError gives False. The causes of the error are not examined.
    """
    return _is(error, frozenset((_NO_MEMORY_CODE,)), _NO_MEMORY_TEXT)


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text, without the advice that torch appends to every CUDA error."""
    return str(error).strip().partition("\n")[0]


def _is(error: BaseException, codes: frozenset[int], text: re.Pattern[str]) -> bool:
    if not isinstance(error, RuntimeError):  # the type that torch and Triton raise
        return False
    return getattr(error, "error_code", None) in codes or text.search(str(error)) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen = set[int]()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
