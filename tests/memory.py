"""Makes the environment variables for processes whose use of memory is measured, so that the result is reproducible."""

import os

FEW_ARENAS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables that make the memory of a process reproducible. By default the allocator gives each thread an
arena of its own, which keeps freed memory; Arrow starts as many threads as the machine has cores, and its memory pool
reserves addresses by the gigabyte. The memory would then depend on the machine and on the timing of the threads."""


def environment() -> dict[str, str]:
    """Return the environment of this process with FEW_ARENAS added."""
    return {**os.environ, **FEW_ARENAS}
