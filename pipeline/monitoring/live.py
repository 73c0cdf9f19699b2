"""Writes and reads `_job/live.json`, the driver's regular report, which shows whether a job is running or dead.

The file only informs people and monitors: a job runs, resumes and ends the same without it.
"""

import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from time import time

from pydantic import TypeAdapter, ValidationError

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.errors import StorageError
from pipeline.core.events import ReplicaStats
from pipeline.core.machine import boot_id, uptime
from pipeline.output.layout import JOB, LIVE
from pipeline.output.records import to_json
from pipeline.storage.storage import Storage

INTERVAL_S = 10.0
"""Seconds between two writes; each write is one storage request."""
DEAD_AFTER = 3
"""Number of intervals (INTERVAL_S) without a new report after which a driver counts as dead."""
DEAD_AFTER_S = DEAD_AFTER * INTERVAL_S
COMPLETE = "complete"
"""Value of `ended` if the run completed its job."""
CLOSE_S = 5.0
"""Maximum seconds for the last write; if the storage takes longer, the driver ends without waiting for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReplica:
    """A replica that has loaded its model and is not lost. Rates and means cover the last minute."""

    name: str
    doing: str
    """A few words about its current work."""
    heard: float
    """Time of its last report, in seconds since 1970 by the driver's clock, like all times in this module."""
    rows_per_s: float
    tokens_per_s: float
    batch_rows: float
    """Mean number of rows computed together, averaged over the rows that ended; 0 if none did."""
    tokens_per_forward: float
    """Completion tokens per denoiser forward of a row; 0 without such forwards, as in the AR modes."""
    padding_share: float
    """Share (0 to 1) of the tokens in prefill forwards that is padding; 0 without prefill."""
    stats: ReplicaStats
    """Counts of the replica, without error kinds: `Live` has those of the whole run, which keeps the file small with
    hundreds of replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """The content of live.json: the whole job as its driver sees it.

    Counts of rows, units and error rows cover the job; losses, retries and error kinds cover this run.
    """

    time: float
    """Time of the write; the driver's process was alive then. The clock of the driver's machine may be wrong, so a
    reader must not compare it with its own (see pipeline.monitoring.pulse)."""
    sampled: float
    """Time when the driver's loop last collected these numbers."""
    fingerprint: str
    started: float
    """Time when this run began."""
    ended: str | None
    """The way the run ended: COMPLETE, or the reason why it did not complete; None while it is running."""
    rows: int
    """Finished rows, including those of units in progress."""
    total_rows: int
    errors: int
    """Error rows among `rows`."""
    units: int
    """Published units."""
    total_units: int
    rows_per_s: float
    tokens_per_s: float
    eta_s: float | None
    """Estimated seconds until the job is done; None if that is not known, as while no rows are finished."""
    replicas: tuple[LiveReplica, ...]
    replicas_lost: int
    """Number of replicas that were lost or did not start."""
    losses: tuple[str, ...]
    """The last few losses, oldest first, each as `name: reason`."""
    unit_retries: int
    """Number of times that a unit, or a range of its rows, was given back because reading or publishing it failed, or
    because its replica was lost after it had reported progress on it."""
    error_kinds: tuple[ErrorCount, ...]
    left_out: tuple[str, ...] = ()
    """One text for each slot that is left out, with the reason (SlotLeftOut)."""
    writes: int = 0
    """Number of this write, from 1: while the driver lives, each write changes the file. 0 from earlier versions."""
    boot: str = ""
    """The driver's machine (pipeline.core.machine.boot_id); "" if it is not known."""
    uptime: float = 0.0
    """Time of the write by the clock that all processes of that machine share (pipeline.core.machine.uptime)."""

    @property
    def storage_retries(self) -> int:
        """Return the number of storage retries of the replicas that are alive now."""
        return sum(replica.stats.storage_retries for replica in self.replicas)


_LIVE = TypeAdapter(Live)


def read_live(storage: Storage, fingerprint: str) -> Live | None:
    """Return the last report in live.json, or None if there is none, if it cannot be parsed, or if it is from a job
    with another fingerprint.

    Raises StorageError if the storage fails.
    """
    with suppress(ValidationError):
        live = _LIVE.validate_json(storage.read_if_exists(LIVE) or b"")
        return live if live.fingerprint == fingerprint else None
    return None


class LiveFile:
    """The live.json of a job, written by a thread of its own so that slow or unreachable storage does not delay the
    job.

    The thread writes at every interval, even while the driver's loop hangs or loads a model; `sampled` is then old.
    """

    def __init__(self, output_path: str, interval_s: float = INTERVAL_S) -> None:
        self._storage, self._interval_s = Storage(output_path, anchor=JOB), interval_s
        self._newest: Live | None = None
        self._writes = 0
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)

    def show(self, live: Live) -> None:
        """Set the report that is written next, without waiting. The first one is written at once."""
        first, self._newest = self._newest is None, live
        if first:
            try:
                self._thread.start()
            except RuntimeError:  # no more threads are allowed: this is tried again with the next report
                self._newest = None

    def close(self, live: Live | None) -> None:
        """Write `live` a last time and end the thread. If another driver owns the file, pass None: then nothing more is
        written.

        This waits at most CLOSE_S seconds, and does nothing if `show` was never called.
        """
        if self._newest is None:
            return
        self._newest, self._closed = live, True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            closed = self._closed  # read before `_newest`, so that the last report is still written
            if (live := self._newest) is not None:
                self._writes += 1
                signed = replace(live, time=time(), writes=self._writes, boot=boot_id(), uptime=uptime())
                with suppress(StorageError):
                    self._storage.write(LIVE, to_json(asdict(signed)))
            if closed:
                return
            self._wake.wait(self._interval_s)
