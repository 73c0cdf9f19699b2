"""Tests how errors of a device are recognised: those of CUDA as torch raises them, of cuBLAS and of Triton, and those
that are the cause of another error."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from model import Engine, EngineLimits, GenerationParams, Request, load_model
from model.network.tower import Tower
from model.requests import EngineError
from model.runtime.device_errors import device_lost, first_line, out_of_memory

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)


def cuda_error(code: int, text: str) -> Exception:
    """Return an error as torch makes it from an error of the CUDA runtime."""
    error = torch.AcceleratorError(f"CUDA error: {text}{ADVICE}")
    error.error_code = code  # type: ignore[attr-defined]
    return error


LOST = [
    cuda_error(700, "an illegal memory access was encountered"),
    cuda_error(710, "device-side assert triggered"),
    cuda_error(719, "unspecified launch failure"),
    cuda_error(214, "uncorrectable ECC error encountered"),
    cuda_error(702, "the launch timed out and was terminated"),
    cuda_error(718, "a text of a later CUDA"),
    torch.AcceleratorError("CUDA error: misaligned address"),  # without a code, the text is enough
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"),
    cuda_error(2, "out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
NEITHER = [
    cuda_error(900, "operation not permitted when stream is capturing"),
    cuda_error(901, "operation failed due to a previous error during capture"),
    cuda_error(1, "invalid argument"),
    cuda_error(701, "too many resources requested for launch"),
    OutOfResources(300_000, 232_448, "shared memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx( handle)`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    ValueError("prompt: CUDA error: unspecified launch failure"),
]


@pytest.mark.parametrize("error", LOST + NO_MEMORY + NEITHER, ids=first_line)
def test_what_an_error_means(error: Exception) -> None:
    assert device_lost(error) == (error in LOST)
    assert out_of_memory(error) == (error in NO_MEMORY)


def test_host_memory_that_runs_out_is_told_by_what_torch_really_raises() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_the_cause_counts_however_it_is_wrapped() -> None:
    with pytest.raises(EngineError) as caught:
        raise EngineError("denoise of 3 rows failed") from LOST[0]
    assert device_lost(caught.value)
    assert not out_of_memory(caught.value)
    assert not device_lost(EngineError("denoise of 3 rows failed"))


@pytest.mark.slow
@pytest.mark.parametrize("error", [LOST[0], LOST[7], NO_MEMORY[1], NO_MEMORY[2]], ids=first_line)
def test_the_engine_halves_its_rows_for_memory_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The real engine halves its rows if memory runs out. An error of a lost GPU is raised at once and can still be
    recognised as one."""
    pair = load_model("builtin:noise")
    whole, failures = Tower.run, [error]

    def run(self: Tower, *arguments: object) -> torch.Tensor:
        if self is pair.denoiser and failures:
            raise failures.pop()
        return whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Tower, "run", run)
    engine = Engine(pair, EngineLimits(max_rows=4))
    requests = [Request(key, [10, 11, 12], GenerationParams(max_new_tokens=8)) for key in "abc"]
    if error in NO_MEMORY:
        assert len(engine.generate(requests)) == 3
        assert engine.max_rows == 1, "half of three"
    else:
        with pytest.raises(EngineError, match="denoise of 3 rows failed") as caught:
            engine.generate(requests)
        assert device_lost(caught.value)
        assert engine.max_rows == 4
