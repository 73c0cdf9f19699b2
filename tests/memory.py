"""How a process is started whose memory is measured."""

import os

FEW_ARENAS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
"""Variables that leave chance out of it. By itself the allocator gives each thread an arena of its own, which keeps
what the thread has let go; Arrow has as many threads as the machine has cores, and a pool that reserves addresses by
the gigabyte. Then the memory depends on the machine, and on which thread was how fast."""


def environment() -> dict[str, str]:
    """That of this process, with the variables above."""
    return {**os.environ, **FEW_ARENAS}
