"""Starts Ray clusters for tests."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRIES = 4
"""The most calls of `start` for one node or cluster."""


def start_patiently(start: Callable[[], T]) -> T:
    """Call `start`, which starts a Ray node or cluster, and return its result.

    If Ray says that it timed out, `start` is called again, up to TRIES times in all; any other error, and that of the
    last try, is raised. Ray gives a node 30 s to start. No setting raises this limit, and a busy machine may need more.
    """
    import ray

    for number in range(1, TRIES):
        try:
            return start()
        except Exception as error:  # Ray raises a plain Exception
            if "timed out" not in str(error):
                raise
            print(f"Ray did not start in try {number}: {error}")
            ray.shutdown()  # ends a half-made connection; does nothing if there is none
    return start()
