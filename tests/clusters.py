"""Ray clusters of tests."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRIES = 4


def start_patiently(start: Callable[[], T]) -> T:
    """Return what `start` gives, which starts a node of Ray or a cluster. Ray gives a node 30 s for that, which no
    setting raises and a busy machine may need: then it is started once more."""
    import ray

    for number in range(1, TRIES):
        try:
            return start()
        except Exception as error:  # Ray raises this very class
            if "timed out" not in str(error):
                raise
            print(f"Ray did not start in try {number}: {error}")
            ray.shutdown()  # of a driver that has half connected; does nothing where there is none
    return start()
