"""Reserves the GPUs and CPUs of a replica on a node of Ray and runs an actor there, for the pool, for the bench of a
calibration and for the generator of a preview."""

import contextlib
import functools
import re
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.config.job import WorkersSection
from pipeline.core.errors import ClusterError
from pipeline.core.limits import MEMORY, limit_advice
from pipeline.core.text import one_line
from workers.cluster.connection import amounts, cluster_gone, describe_nodes

# Two concurrency groups: the methods of `call` run one at a time, and those of `ask` run beside them.
_actor_class = functools.cache(ray.remote(concurrency_groups={"control": 1}))  # type: ignore[call-overload]


class ReplicaActor:
    """A placement group (GPUs and CPUs reserved on one node) for a replica of a job, and the actor in it.

    After `kill`, `start` starts another actor in the same group.
    """

    def __init__(self, process: type, workers: WorkersSection) -> None:
        """Request the placement group without waiting for it. `process` is the class of the actor."""
        bundle = {"CPU": float(workers.cpus)} | ({"GPU": float(workers.gpus)} if workers.gpus else {})
        self._group = placement_group([bundle], strategy="STRICT_PACK")
        self._class = _actor_class(process).options(
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, 0),
        )
        self._actor: Any = None

    def has_room(self, wait_s: int = 0) -> bool:
        """Return whether the placement group has been created, after waiting for that for at most `wait_s` seconds.
        They are whole seconds, because Ray drops the fraction."""
        if wait_s:
            self._group.wait(wait_s)
        return bool(placement_group_table(self._group).get("state") == "CREATED")

    def start(self, *arguments: Any) -> None:
        """Start an actor in the placement group, which must have been created. `arguments` go to its class."""
        self._actor = self._class.remote(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor and return a reference to its result at once. Methods called so run one at a
        time."""
        return getattr(self._actor, method).remote(*arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor that may run beside a method of `call`. Return a reference to its result at
        once."""
        return getattr(self._actor, method).options(concurrency_group="control").remote(*arguments)

    def kill(self) -> None:
        """Kill the actor if there is one. The placement group stays reserved."""
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
        self._actor = None

    def close(self) -> None:
        """Kill the actor and remove the placement group, as far as Ray still answers."""
        if cluster_gone():  # the calls would hang; Ray ends the actor by itself
            return
        with contextlib.suppress(RayError):
            self.kill()
            remove_placement_group(self._group)


def death_text(error: RayError) -> str:
    """Return Ray's message about a dead actor as one line that gives the cause and what helps, without ids."""
    whole = one_line(error)
    if memory := re.search(r"Memory on the node \(IP: ([^,)]+).*? was (\S+) used / (\S+) limit", whole):
        node, used, limit = memory.groups()
        return f"Ray's memory monitor killed it, because node {node} used {used} of {limit} of memory; {MEMORY}"
    text = whole[:1000]
    for start in ("The actor is dead because ", "The actor died because "):
        text = text.split(start, 1)[-1]
    text = text.split(" Some common causes include")[0]
    if "Worker unexpectedly exits" in text:  # Ray's text for a process that was killed or has crashed
        return f"its process has died, killed or crashed, often at the memory limit of the container or node: {MEMORY}"
    return f"{text}{limit_advice(text)}"


def no_room(workers: WorkersSection, advice: str) -> ClusterError:
    """Return the error for a replica that no node had room for within workers.start_timeout_s. `advice` ends its
    text."""
    return ClusterError(
        f"no node has room for a replica of {amounts({'GPU': workers.gpus, 'CPU': workers.cpus})} after "
        f"{workers.start_timeout_s:g} s (workers.start_timeout_s); the cluster has {describe_nodes()}; lower "
        f"workers.gpus or workers.cpus, {advice}"
    )
