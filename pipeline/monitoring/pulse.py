"""Tells how long ago a driver last wrote its report, without comparing the clocks of two machines.

The clocks of driver and reader may be an hour apart. On the same machine, both read the clock that nobody sets. From
another machine, a reader sees only whether live.json changes while it looks.
"""

from dataclasses import dataclass

from pipeline.core.machine import boot_id
from pipeline.monitoring.live import DEAD_AFTER_S, Live


@dataclass(frozen=True, slots=True)
class Pulse:
    """The driver's last report as a reader saw it. Times are those of the reader's clock, pipeline.core.machine.uptime.

    `undecided` says that the reader must look for longer before it knows whether the driver lives.
    """

    live: Live | None
    """The report; None if there is none that can be read."""
    at: float
    """Time of the last look."""
    first_seen: float
    """Time of the first look at this report. It has not changed since."""
    heard: float | None
    """Time when the report was written, as far as that is known without the driver's clock; None if it is not."""

    @property
    def age(self) -> float | None:
        """Return the seconds since the report was written, at least 0; None if that is not known."""
        return None if self.heard is None else max(0.0, self.at - self.heard)

    @property
    def unchanged(self) -> float:
        """Return the seconds for which the report is known to have stayed the same."""
        return self.at - self.first_seen if self.age is None else self.age

    @property
    def beats(self) -> bool:
        """Return whether the driver is known to have written its report within the last DEAD_AFTER_S seconds."""
        return self.age is not None and self.age <= DEAD_AFTER_S

    @property
    def undecided(self) -> bool:
        """Return whether the driver may live or not: its report does not say that the run has ended, it may be from
        another machine, and it has not been looked at for long enough."""
        running = self.live is not None and self.live.ended is None
        return running and self.age is None and self.unchanged <= DEAD_AFTER_S


def take_pulse(live: Live | None, at: float, before: Pulse | None = None) -> Pulse:
    """Return the pulse at the time `at`, when `live` was read. `before`: the pulse at the last look, if there was
    one."""
    if live is None:
        return Pulse(None, at, at, None)
    if before is not None and before.live == live:
        return Pulse(live, at, before.first_seen, before.heard)
    if live.boot and live.boot == boot_id() and live.uptime <= at:
        return Pulse(live, at, at, live.uptime)
    changed = before is not None and before.live is not None
    return Pulse(live, at, at, at if changed else None)
