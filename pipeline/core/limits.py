"""Says what helps if the machine, not this program, ended something: no more processes or memory were allowed."""

import errno
import re

MEMORY = (
    "give the container or the node more memory, or put fewer replicas on a node (more workers.cpus for each); "
    "`dmesg` on the node, or OOMKilled in the pod's status, tells whether that was it"
)
"""What helps if the memory of the host ran out."""
PROCESSES = (
    "the limit on processes and threads is reached: raise the pids limit of the container (pids.max of its cgroup) or "
    "`ulimit -u`"
)
"""What helps if no more processes or threads may be started."""
_PROCESSES = re.compile(r"can't start new thread|fork.{0,20}Resource temporarily unavailable|pthread_create")
_MEMORY = re.compile(r"running low on memory|memory monitor|MemoryError|Cannot allocate memory|std::bad_alloc")


def limit_advice(text: str) -> str:
    """Return what helps against the error with this text, to be put after it, if it says that a limit of the host was
    reached; else "". The memory of a GPU is none of the host's."""
    if _PROCESSES.search(text):
        return f"; {PROCESSES}"
    if _MEMORY.search(text) and "CUDA" not in text:
        return f"; {MEMORY}"
    return ""


def is_limit(error: BaseException) -> bool:
    """Return whether an exception says that this process may not start another process or thread, or gets no more
    memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or (error.errno == errno.EAGAIN and isinstance(error, BlockingIOError))
    return isinstance(error, MemoryError) or (type(error) is RuntimeError and bool(_PROCESSES.search(str(error))))


def limit_text(error: BaseException) -> str:
    """Return one line about an error for which `is_limit` is true, with what helps."""
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    said = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return f"{said}; {MEMORY if memory else PROCESSES}"
