"""Runs a pool of replicas on Ray. A lost replica is replaced, and further wanted replicas start when nodes join the
cluster.

In this module a slot is a place for a replica. It has one placement group, which waits for room and then holds one
actor after the other (r0, then r0.2 after a loss). The driver keeps two `work` calls outstanding on every actor, so
that no actor idles while its report travels.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.config.job import WorkersSection
from pipeline.core.events import Event, ReplicaActive, ReplicaLost, ReplicaReady
from pipeline.core.text import counted
from pipeline.core.types import Assignment
from workers.cluster.actor import ReplicaActor, death_text, no_room
from workers.cluster.connection import amounts, connect, describe_nodes, lost_cluster, shutdown
from workers.replica.replica import FLUSH_S, MakeRunner, ReplicaProcess, Report

WORK_S = 2.0
"""Seconds after which a `work` call returns; the driver learns of progress at most this late."""
CALLS_AHEAD = 2
"""The number of `work` calls that are outstanding on every ready actor."""
LOOK_S = 5.0
"""If a replica has not reported for this many seconds, it is asked what it is doing, while its `work` call still
runs."""
CHECK_S = 0.5
"""Seconds between two looks at the placement groups that wait for room."""
NOTICE_S = 5.0
"""If there is no room for all wanted replicas after this many seconds, one message says what the cluster has."""
START_S = 3600.0
"""A replica that has not loaded its model after this many seconds is replaced. The stall watch cannot do that, because
it only watches replicas that hold work."""
BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0
"""Seconds to wait before a replica that failed to start is started again: the first pause, doubled after each failure,
and the longest pause."""
LONGEST_BACKOFF_S = 600.0
"""The longest pause if the replicas did start, but died before they generated a row."""


@dataclass
class _Slot:
    """A place for a replica, with the state of the replica that is there now. Times are in seconds of a monotonic
    clock."""

    number: int
    actor: ReplicaActor
    lives: int = 0
    """Number of actors that were started here so far."""
    started_at: float = 0.0
    """Time at which the last actor was started."""
    ready: bool = False
    """Whether the replica has loaded its model and is not lost."""
    calls: deque[Any] = field(default_factory=deque)
    """Outstanding `work` calls, oldest first; until the replica is ready, its `start` call; none without an actor."""
    looks: list[Any] = field(default_factory=list)
    """The outstanding `look` call, which asks the replica what it is doing, if there is one."""
    heard_at: float = 0.0
    """The time of the replica's last report, from its `start` or a `work` call, or the time at which the last `look`
    call was made, if that is later. LOOK_S seconds after this time a ready replica is asked again what it is doing."""
    generated: bool = False
    """Whether the replica has generated a row or a control."""
    failures: int = 0
    """Number of replicas that ended here in a row before they generated a row or a control."""
    not_before: float = 0.0
    """Time before which no other actor is started, after such a replica."""

    @property
    def name(self) -> str:
        """Return the name of the replica that was started here last: r0, and then r0.2 for its replacement."""
        return f"r{self.number}" if self.lives == 1 else f"r{self.number}.{self.lives}"


class RayPool:
    """A pipeline.driver.dispatcher.Pool whose replicas are Ray actors, one in each placement group.

    It runs at most `units` replicas at a time, and not more than workers.replicas. `tell` is called with messages for
    the operator. `stopped` returns whether the job is being stopped (see connect). Creating a pool raises ClusterError
    if Ray cannot be used.
    """

    def __init__(
        self,
        make_runner: MakeRunner,
        settings: WorkersSection,
        units: int,
        tell: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ours = connect(stopped)
        self._make_runner, self._settings, self._tell = make_runner, settings, tell
        self._limit = units if settings.replicas == "auto" else min(units, settings.replicas)
        self._slots: list[_Slot] = []
        self._dropped: list[Event] = []
        self._checked = float("-inf")
        self._empty_since: float | None = time.monotonic()
        self._notice_at = time.monotonic() + NOTICE_S

    def assign(self, replica: str, work: Assignment) -> None:
        """See Pool."""
        for slot in self._slots:
            if slot.ready and slot.name == replica:
                slot.actor.ask("assign", work)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """See Pool. Raises ClusterError if Ray is lost, or if there has been no room for even one replica for
        start_timeout_s seconds."""
        if self._dropped:
            events, self._dropped = self._dropped, []
            return events
        with lost_cluster("; submit the job again"):
            self._fill_slots()
            return self._listen(timeout_s)

    def drop(self, replica: str, reason: str) -> None:
        """See Pool."""
        for slot in self._slots:
            if slot.ready and slot.name == replica:
                self._dropped.append(self._lose(slot, Report(fatal=reason)))

    def close(self) -> None:
        """See Pool. Also shuts down the Ray cluster if this pool started it."""
        if ray.is_initialized():
            with contextlib.suppress(RayError):
                self._flush()
            for slot in self._slots:
                slot.actor.close()
        self._slots.clear()
        if self._ours:
            shutdown()
            self._ours = False

    def _flush(self) -> None:
        """Let all replicas save their finished rows at the same time, because a stopped job is often killed soon."""
        calls = [slot.actor.ask("stop", FLUSH_S) for slot in self._slots if slot.ready]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=FLUSH_S + 1) if calls else ([], [])
        rows = 0
        for call in done:
            with contextlib.suppress(RayError):  # the replica is dead
                rows += ray.get(call)
        if rows:
            self._tell(f"saved {counted(rows, 'finished row')} of unfinished units")

    def _listen(self, timeout_s: float) -> list[Event]:
        """Wait until a call has returned, for at most `timeout_s` seconds, and return the events of all that have.

        A replica that has not loaded its model within START_S is given up as lost.
        """
        self._look_in()
        now, late = time.monotonic(), Report(fatal=f"its model was not loaded within {START_S / 60:g} minutes")
        loading = [slot for slot in self._slots if slot.calls and not slot.ready]
        events: list[Event] = [self._lose(slot, late) for slot in loading if now - slot.started_at >= START_S]
        by_call = {call: slot for slot in self._slots for call in (*slot.calls, *slot.looks)}
        if not by_call:
            time.sleep(min(timeout_s, CHECK_S))
            return events
        # Wait until one call has returned, then collect all calls that have returned by then.
        ray.wait(list(by_call), num_returns=1, timeout=timeout_s, fetch_local=False)
        done, _ = ray.wait(list(by_call), num_returns=len(by_call), timeout=0, fetch_local=False)
        for call in done:
            slot = by_call[call]
            if call in slot.calls:  # false if the replica was lost earlier in this loop
                slot.calls.remove(call)
                events += self._hear(slot, call)
            elif call in slot.looks:
                slot.looks.remove(call)
                with contextlib.suppress(RayError):  # its `work` call fails too, and reports the loss
                    events += ray.get(call)
        return events

    def _look_in(self) -> None:
        """Ask each replica that has not reported for LOOK_S what it is doing."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.ready and not slot.looks and now - slot.heard_at >= LOOK_S:
                slot.heard_at = now
                slot.looks.append(slot.actor.ask("look"))

    def _hear(self, slot: _Slot, call: Any) -> list[Event]:
        """Return the events of one call that has returned, and keep enough `work` calls outstanding."""
        try:
            report: Report = ray.get(call)
        except RayError as error:  # the replica is dead, or its code or its environment is broken
            report = Report(fatal=death_text(error))
        events = list(report.events)
        if report.fatal is not None:
            return [*events, self._lose(slot, report)]
        if not slot.ready:
            slot.ready, slot.generated = True, False
            events.insert(0, ReplicaReady(slot.name, report.max_rows, report.node))
        if any(isinstance(event, ReplicaActive) and event.stats and event.stats.generated for event in events):
            slot.generated, slot.failures = True, 0
        slot.heard_at = time.monotonic()
        while len(slot.calls) < CALLS_AHEAD:
            slot.calls.append(slot.actor.call("work", WORK_S))
        return events

    def _lose(self, slot: _Slot, report: Report) -> ReplicaLost:
        """Kill the replica in the slot and return its ReplicaLost event. `report` says why it is lost."""
        lost = ReplicaLost(slot.name, report.fatal or "", report.refused, report.excused)
        if not slot.generated and not report.excused:
            slot.failures += 1
            longest = LONGEST_BACKOFF_S if slot.ready else MAX_BACKOFF_S
            slot.not_before = time.monotonic() + min(longest, BACKOFF_S * 2 ** (slot.failures - 1))
        slot.actor.kill()
        slot.ready = False
        slot.calls.clear()
        slot.looks.clear()
        return lost

    def _fill_slots(self) -> None:
        """Request placement groups, and start an actor in every group that has room."""
        now = time.monotonic()
        if now - self._checked < CHECK_S:
            return
        self._checked = now
        without_room = [slot for slot in self._slots if not slot.calls and not self._settle(slot, now)]
        auto = self._settings.replicas == "auto"
        while len(self._slots) < self._limit and not (auto and without_room):
            slot = _Slot(len(self._slots), ReplicaActor(ReplicaProcess, self._settings))
            self._slots.append(slot)
            # With "auto", only one group at a time waits for nodes to join: the next one is requested only after this
            # one has had time to get its room.
            if not self._settle(slot, now, wait_s=1 if auto else 0):
                without_room.append(slot)
        self._check_room(len(without_room), now)

    def _settle(self, slot: _Slot, now: float, wait_s: int = 0) -> bool:
        """Return whether the slot's placement group has room. If so, start an actor in it, unless it is too early
        (`not_before`)."""
        if not slot.actor.has_room(wait_s):
            return False
        if now >= slot.not_before:
            slot.lives, slot.started_at, slot.generated = slot.lives + 1, now, False
            slot.actor.start(slot.name, self._make_runner)
            slot.calls.append(slot.actor.call("start"))
        return True

    def _check_room(self, without_room: int, now: float) -> None:
        """Tell the operator once if `without_room` placement groups still wait for room after NOTICE_S.

        Raises ClusterError if there was no room for any replica for `start_timeout_s`.
        """
        if without_room < len(self._slots):
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        if self._empty_since is not None and now - self._empty_since >= self._settings.start_timeout_s:
            raise no_room(self._settings, "free the nodes or add some")
        if without_room and now >= self._notice_at:
            self._notice_at = float("inf")
            fits = len(self._slots) - without_room
            if fits == 0 or self._settings.replicas != "auto":
                size = amounts({"GPU": self._settings.gpus, "CPU": self._settings.cpus})
                self._tell(
                    f"room for {fits} of {counted(len(self._slots), 'replica')} of {size} each; the cluster has "
                    f"{describe_nodes()}; the others start as soon as there is room"
                )
