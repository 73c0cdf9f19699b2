"""Tests of the advice for errors of the machine: it is given for limits of the host alone."""

import pytest

from pipeline.core.limits import MEMORY, PROCESSES, limit_advice


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("RuntimeError: can't start new thread", PROCESSES),
        ("bash: fork: retry: Resource temporarily unavailable", PROCESSES),
        ("fork: Resource temporarily unavailable", PROCESSES),
        ("MemoryError: ", MEMORY),
        ("std::bad_alloc", MEMORY),
        ("1 worker(s) were killed due to the node running low on memory.", MEMORY),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", None),
        ("CUDA error: MemoryError", None),
        ("BlockingIOError: [Errno 11] Resource temporarily unavailable", None),  # any pipe or lock may say this
        ("ValueError: no", None),
    ],
)
def test_advice_follows_the_text(text: str, advice: str | None) -> None:
    assert limit_advice(text) == (f"; {advice}" if advice else "")
