"""Tests of the texts about dead replicas: each names the cause and what helps. The texts of Ray are those of 2.60."""

import pytest
from ray.exceptions import RayError

from pipeline.core.limits import MEMORY, PROCESSES
from workers.cluster.actor import death_text

pytestmark = pytest.mark.ray

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: ReplicaProcess\nThe actor is dead because "
    "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer"
)
LOW_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: d0b0a9a6) "
    "was 3.34GB used / 23.54GB limit (0.141927) OOM kill reason: Memory usage 3579510784B exceeded threshold"
)
NODE = "The actor died because its node has died. Node Id: 0123"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            KILLED,
            f"its process has died, killed or crashed, often at the memory limit of the container or node: {MEMORY}",
        ),
        (
            LOW_MEMORY,
            f"Ray's memory monitor killed it, because node 192.0.2.2 used 3.34GB of 23.54GB of memory; {MEMORY}",
        ),
        (NODE, "its node has died. Node Id: 0123"),
        ("RuntimeError: can't start new thread", f"RuntimeError: can't start new thread; {PROCESSES}"),
    ],
)
def test_a_death_says_what_helps(text: str, said: str) -> None:
    assert death_text(RayError(text)) == said
