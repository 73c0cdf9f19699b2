"""A pool of replicas on Ray: one placement group and one actor each, replaced when lost, more as nodes join.

A slot is a place for a replica: its group waits for room, then holds one actor after the other (r0, then r0.2 after a
loss). The driver keeps two `work` calls outstanding on every actor, so that none idles for a round trip.
"""

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.dispatch import Event, ReplicaLost, ReplicaReady
from pipeline.errors import ClusterError
from pipeline.job import WorkersSection
from pipeline.types import Assignment
from workers.replica import MakeRunner, Replica, Report

CONNECT_S = 10.0
WORK_S = 2.0
"""A `work` call returns at the latest after this: how old the progress may be."""
CALLS_AHEAD = 2
CHECK_S = 0.5
"""How often groups that wait for room are looked at."""
NOTICE_S = 5.0
"""After this long without room for all that was asked, the operator is told what the cluster has."""
BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0
"""Before a replica that could not start is tried again; doubled each time, up to the second."""
OBJECT_STORE_BYTES = 100 << 20
"""For a cluster of our own: only reports go through it."""


@dataclass
class _Slot:
    """A place for a replica."""

    number: int
    group: PlacementGroup
    actor: Any = None
    lives: int = 0
    ready: bool = False
    calls: deque[Any] = field(default_factory=deque)
    """Outstanding calls, oldest first; `start` alone until the replica is ready."""
    failures: int = 0
    """Starts that failed since it was last ready."""
    not_before: float = 0.0

    @property
    def name(self) -> str:
        return f"r{self.number}" if self.lives == 1 else f"r{self.number}.{self.lives}"


def connect() -> bool:
    """Join the cluster at RAY_ADDRESS (a submitted job has it), or start one on this machine for the time of the job.

    Returns whether this call connected, and so whether `ray.shutdown` is ours. Raises ClusterError.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS is {address}, a job server: use `ray job submit`, or unset it to run on this machine alone"
        )
    if not address:
        # "local", or Ray would silently join whatever cluster was started on this machine before.
        quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        _check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**quiet)
    except SystemExit:  # ray.init() has a handler of its own for SIGTERM: hand the signal on to ours
        signal.alarm(0)  # and one in C++ that aborts the process three seconds later
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
        raise ClusterError("stopped; Ray was still starting; submit the same job again to resume") from None
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be used: {_one_line(str(error))}") from error
    return True


def _check_reachable(address: str) -> None:
    """Ray itself tries a dead address for minutes, with a page of warnings."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ClusterError(
                f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({error}); start it, or unset RAY_ADDRESS "
                "to run on this machine alone"
            ) from error


class RayPool:
    """Implements pipeline.dispatch.Pool. `units` bounds the replicas; `tell` gets messages for the operator."""

    def __init__(
        self, make_runner: MakeRunner, settings: WorkersSection, units: int, tell: Callable[[str], None]
    ) -> None:
        self._ours = connect()
        self._make_runner, self._settings, self._tell = make_runner, settings, tell
        # Two threads of calls: `work` one at a time, and `assign` beside it.
        self._actor_class = ray.remote(concurrency_groups={"control": 1})(Replica)  # type: ignore[call-overload]
        self._limit = units if settings.replicas == "auto" else min(units, settings.replicas)
        self._slots: list[_Slot] = []
        self._checked = float("-inf")
        self._empty_since: float | None = time.monotonic()
        self._notice_at = time.monotonic() + NOTICE_S

    def assign(self, replica: str, work: Assignment) -> None:
        """See Pool."""
        for slot in self._slots:
            if slot.ready and slot.name == replica:
                slot.actor.assign.options(concurrency_group="control").remote(work)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """See Pool. Raises ClusterError where `start_timeout_s` passed without room for a single replica."""
        try:
            self._fill_slots()
            return self._listen(timeout_s)
        except RayError as error:
            raise ClusterError(f"the Ray cluster was lost: {_one_line(str(error))}; submit the job again") from error

    def drop(self, replica: str, reason: str) -> None:
        """See Pool."""
        raise NotImplementedError

    def close(self) -> None:
        """See Pool. A cluster that this pool started goes too."""
        if ray.is_initialized():
            for slot in self._slots:
                with contextlib.suppress(RayError):
                    self._kill(slot)
                    remove_placement_group(slot.group)
        self._slots.clear()
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _listen(self, timeout_s: float) -> list[Event]:
        by_call = {call: slot for slot in self._slots for call in slot.calls}
        if not by_call:
            time.sleep(min(timeout_s, CHECK_S))
            return []
        # The first to return ends the waiting; whatever else has returned by then comes with it.
        ray.wait(list(by_call), num_returns=1, timeout=timeout_s, fetch_local=False)
        done, _ = ray.wait(list(by_call), num_returns=len(by_call), timeout=0, fetch_local=False)
        events: list[Event] = []
        for call in done:
            slot = by_call[call]
            if call in slot.calls:  # not one of a replica that was lost a moment ago
                slot.calls.remove(call)
                events += self._hear(slot, call)
        return events

    def _hear(self, slot: _Slot, call: Any) -> list[Event]:
        """The events of one call that has returned."""
        try:
            report: Report = ray.get(call)
        except RayActorError as error:
            report = Report(fatal=_death(error))
        except RayError as error:  # the replica could not even report: its code or environment is broken
            report = Report(fatal=_one_line(str(error)))
        events: list[Event] = [*report.progress, *report.outcomes]
        if report.fatal is not None:
            return [*events, self._lose(slot, report.fatal, report.refused)]
        if not slot.ready:
            slot.ready, slot.failures = True, 0
            events.append(ReplicaReady(slot.name))
        while len(slot.calls) < CALLS_AHEAD:
            slot.calls.append(slot.actor.work.remote(WORK_S))
        return events

    def _lose(self, slot: _Slot, reason: str, refused: bool) -> ReplicaLost:
        lost = ReplicaLost(slot.name, reason, refused)
        if not slot.ready:
            slot.failures += 1
            slot.not_before = time.monotonic() + min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (slot.failures - 1))
        self._kill(slot)
        return lost

    def _kill(self, slot: _Slot) -> None:
        if slot.actor is not None:
            ray.kill(slot.actor, no_restart=True)
        slot.actor, slot.ready = None, False
        slot.calls.clear()

    def _fill_slots(self) -> None:
        """Ask for groups, and put an actor into every group that has room."""
        now = time.monotonic()
        if now - self._checked < CHECK_S:
            return
        self._checked = now
        without_room = [slot for slot in self._slots if slot.actor is None and not self._settle(slot, now)]
        while len(self._slots) < self._limit and (self._settings.replicas != "auto" or not without_room):
            slot = self._new_slot()
            if not self._settle(slot, now):
                without_room.append(slot)
        self._check_room(len(without_room), now)

    def _new_slot(self) -> _Slot:
        bundle = {"CPU": float(self._settings.cpus)}
        if self._settings.gpus:
            bundle["GPU"] = float(self._settings.gpus)
        slot = _Slot(len(self._slots), placement_group([bundle], strategy="STRICT_PACK"))
        self._slots.append(slot)
        if self._settings.replicas == "auto":
            # The next group is asked for only when this one has its room: one at a time waits for nodes to join.
            slot.group.wait(1)
        return slot

    def _settle(self, slot: _Slot, now: float) -> bool:
        """Start an actor in the slot's group; False where the group waits for room."""
        if placement_group_table(slot.group).get("state") != "CREATED":
            return False
        if now >= slot.not_before:
            slot.lives += 1
            slot.actor = self._actor_class.options(
                num_cpus=self._settings.cpus,
                num_gpus=self._settings.gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(slot.group, 0),
            ).remote(slot.name, self._make_runner)
            slot.calls.append(slot.actor.start.remote())
        return True

    def _check_room(self, without_room: int, now: float) -> None:
        """Tell the operator, or give up, where groups wait for room."""
        if without_room < len(self._slots):
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        if self._empty_since is not None and now - self._empty_since >= self._settings.start_timeout_s:
            raise ClusterError(
                f"no node has room for a replica of {self._wanted()} after {self._settings.start_timeout_s:g} s "
                f"(workers.start_timeout_s); the cluster has {describe_nodes()}; lower workers.gpus or workers.cpus, "
                "free the nodes or add some"
            )
        if without_room and now >= self._notice_at:
            self._notice_at = float("inf")
            fits = len(self._slots) - without_room
            if fits == 0 or self._settings.replicas != "auto":
                self._tell(
                    f"room for {fits} of {len(self._slots)} replicas of {self._wanted()} each; the cluster has "
                    f"{describe_nodes()}; the others start as room comes"
                )

    def _wanted(self) -> str:
        return _amounts({"GPU": self._settings.gpus, "CPU": self._settings.cpus})


def describe_nodes() -> str:
    """What each node of the cluster has in all, used or not."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    texts = [f"{node['NodeManagerAddress']}: {_amounts(node['Resources'])}" for node in nodes]
    return f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} ({'; '.join(texts)})"


def _amounts(resources: dict[str, Any]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU"))


def _death(error: RayActorError) -> str:
    """Ray's lines of text about a dead actor as one line: the cause without ids and advice."""
    text = _one_line(str(error))
    for start in ("The actor is dead because ", "The actor died because "):
        text = text[text.index(start) + len(start) :] if start in text else text
    return text.split(" Some common causes include")[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]
