"""What an error of a device means, told from the error itself: free of torch, for all who have to decide what is next.

CUDA's errors come as torch.AcceleratorError, which carries CUDA's number; as RuntimeError, from cuBLAS, cuDNN and
Triton, with a text alone; and as the cause of an EngineError. Numbers and texts are those of cudaError_t.
"""

import re
from collections.abc import Iterator

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
# A library that cannot make its handle has found no room for its workspace. Triton's "out of resource" is not here: a
# program that asks for more shared memory than the chip has asks for as much with fewer rows.
_NO_MEMORY_TEXT = re.compile(
    r"(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory"
    "|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    "|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create"
    "|CUDA out of memory"
    "|DefaultCPUAllocator"
)


def device_lost(error: BaseException) -> bool:
    """Whether the process can no longer use its GPU, so that nothing but a new process helps.

    After such an error every later call fails as well, whatever it does and whichever rows it is for.
    """
    return any(_is(each, _LOST_CODES, _LOST_TEXT) for each in _chain(error))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device or of the host ran out, so that fewer rows may help."""
    return _is(error, frozenset((_NO_MEMORY_CODE,)), _NO_MEMORY_TEXT)


def first_line(error: BaseException) -> str:
    """What an error says, without the lines of advice that torch puts behind every error of CUDA."""
    return str(error).strip().partition("\n")[0]


def _is(error: BaseException, codes: frozenset[int], text: re.Pattern[str]) -> bool:
    if not isinstance(error, RuntimeError):  # as torch and Triton raise them
        return False
    return getattr(error, "error_code", None) in codes or text.search(str(error)) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen = set[int]()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
