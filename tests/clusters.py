"""Starts Ray clusters for tests."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRIES = 4


def start_patiently(start: Callable[[], T]) -> T:
    """Call `start`, which starts a Ray node or cluster, up to TRIES times while it times out, and return its result.

    Ray gives a node 30 s to start. No setting raises this limit, and a busy machine may need longer.
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
