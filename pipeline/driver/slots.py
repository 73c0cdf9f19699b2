"""Counts how many replicas in a row died in each slot before they generated a row, and leaves sick slots out.

A slot is a place for one replica after the other. Its first replica gets work at once. If a replica dies before it has
generated a row, the cause may be the slot or its node (its GPUs, its memory, its disk), so the next replica there, and
on the same node, must first generate a control (Assignment.control). No row is ever blamed for the deaths of a slot
that does not pass its control.
"""

from collections import Counter
from dataclasses import dataclass

from pipeline.core.errors import JobFailed
from pipeline.core.events import SlotLeftOut

BARREN_LIVES = 3
"""The number of replicas that must die in a row in a slot, before any of them generated a row, until the slot counts as
left out. If all slots are left out, the job ends."""

LIVES_ALONE = 10
"""The number of replicas that must die in a row in a left-out slot, before any of them generated a row, while no other
slot has a replica that may generate, until the job ends: the other slots are taken for gone for good. With the pauses
of the pool this takes half an hour or more."""


def slot_of(replica: str) -> str:
    """Return the slot of a replica, from its name: `r3` for r3 and r3.2, `local` for local-2."""
    return replica.partition(".")[0].partition("-")[0]


@dataclass(slots=True)
class _Slot:
    node: str
    barren: int = 0
    """The number of replicas that died there in a row before they generated a row."""
    live: bool = True
    """Whether a replica is ready there."""


class Slots:
    """The slots in which replicas have been ready in this run."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._alone: Counter[str] = Counter()  # barren deaths by slot since a replica elsewhere could generate

    def ready(self, replica: str, node: str) -> None:
        """Record a replica that is ready. A slot that has moved to another node begins anew."""
        slot = self._slots.setdefault(slot_of(replica), _Slot(node))
        if slot.node != node:
            slot.node, slot.barren = node, 0
        slot.live = True
        if slot.barren < BARREN_LIVES:
            self._alone.clear()

    def doubtful(self, replica: str) -> bool:
        """Return whether the last replica in the slot of this one, or in another slot of the same node, died before it
        generated a row."""
        own = self._slots[slot_of(replica)]
        return any(slot.barren > 0 and (slot is own or slot.node == own.node != "") for slot in self._slots.values())

    def generated(self, replica: str) -> SlotLeftOut | None:
        """Record that a replica has generated a row or a control. Return an event if its slot was left out until
        now."""
        slot = self._slots[slot_of(replica)]
        before, slot.barren = slot.barren, 0
        self._alone.clear()
        return SlotLeftOut(slot_of(replica), "") if before >= BARREN_LIVES else None

    def left(self, replica: str) -> None:
        """Record that a replica that was ready is gone, for whatever reason. Call it before `lost`."""
        slot = self._slots[slot_of(replica)]
        slot.live = False
        if slot.barren < BARREN_LIVES:
            self._alone.clear()

    def lost(self, replica: str, reason: str) -> SlotLeftOut | None:
        """Record that a replica died before it generated a row. Return an event if its slot is left out from now on.

        Raises JobFailed if all slots are left out now, or if this one has been tried LIVES_ALONE times while no replica
        was ready in one that is not.
        """
        name = slot_of(replica)
        slot = self._slots[name]
        slot.barren += 1
        self._alone[name] += 1
        others = [each for each in self._slots.values() if each.barren < BARREN_LIVES]
        if not others or (self._alone[name] >= LIVES_ALONE and not any(each.live for each in others)):
            total = sum(each.barren for each in self._slots.values())
            raise JobFailed(
                f"{total} replicas died one after the other before they generated a row, and control prompts did not "
                f"help: the cause is not the rows but the replicas or their nodes; the last time: {reason}; no row was "
                "given up for it; see the replicas' logs, and submit the job again"
            )
        if slot.barren != BARREN_LIVES:
            return None
        where = f" on node {slot.node}" if slot.node else ""
        return SlotLeftOut(
            name,
            f"replica slot {name}{where} is left out, because its last {slot.barren} replicas died before they "
            f"generated a row; the last time: {reason}; it gets rows again when a replica there generates a control "
            "prompt",
        )
