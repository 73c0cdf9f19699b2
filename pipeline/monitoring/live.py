"""`_job/live.json`: what a driver says of itself every few seconds, which tells a running job from a dead one.

Nothing depends on it but what people see: a job runs, resumes and ends the same without it.
"""

import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from time import time

from pydantic import TypeAdapter, ValidationError

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.errors import StorageError
from pipeline.core.events import ReplicaStats
from pipeline.output.layout import LIVE
from pipeline.output.records import to_json
from pipeline.storage.storage import Storage

INTERVAL_S = 10.0
"""From one writing to the next: one request to the storage each."""
DEAD_AFTER = 3
"""Intervals without a sign of life after which a driver counts as dead."""
COMPLETE = "complete"
"""`ended` of a run that completed its job."""
CLOSE_S = 5.0
"""For the last writing; the driver ends without it where the storage takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReplica:
    """A replica that has loaded its model. Rates and means are over the last minute."""

    name: str
    doing: str
    heard: float
    """When it last reported, in seconds since 1970 by the driver's clock, as all times here."""
    rows_per_s: float
    tokens_per_s: float
    batch_rows: float
    """Mean number of rows computed together, of the rows that ended."""
    tokens_per_forward: float
    """Of the denoiser, by row; 0 in the AR modes."""
    padding_share: float
    """Of the tokens in prefill forwards, those that are none."""
    stats: ReplicaStats
    """Without its error kinds, which are those of the run: with hundreds of replicas the file stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """The whole job as its driver sees it. Counts of rows are of the job, those of errors and retries of this run."""

    time: float
    """When this was written: the driver's process was alive then."""
    sampled: float
    """When its loop last turned."""
    fingerprint: str
    started: float
    ended: str | None
    """How the run ended: COMPLETE or why not; None: it goes on."""
    rows: int
    total_rows: int
    errors: int
    units: int
    total_units: int
    rows_per_s: float
    tokens_per_s: float
    eta_s: float | None
    replicas: tuple[LiveReplica, ...]
    replicas_lost: int
    losses: tuple[str, ...]
    """Why, of the last few."""
    unit_retries: int
    """Units that went back, because their replica was lost or because reading or publishing them failed."""
    error_kinds: tuple[ErrorCount, ...]

    @property
    def storage_retries(self) -> int:
        """Of the replicas that are there."""
        return sum(replica.stats.storage_retries for replica in self.replicas)


_LIVE = TypeAdapter(Live)


def read_live(storage: Storage, fingerprint: str) -> Live | None:
    """What the last driver of the job with this fingerprint said; None where it said nothing, or it cannot be read."""
    with suppress(ValidationError):
        live = _LIVE.validate_json(storage.read_if_exists(LIVE) or b"")
        return live if live.fingerprint == fingerprint else None
    return None


class LiveFile:
    """Writes live.json from a thread of its own: storage that is slow or away costs the job nothing.

    The thread writes at every interval, also where the driver's loop hangs or loads a model: then `sampled` is old.
    """

    def __init__(self, output_path: str, interval_s: float = INTERVAL_S) -> None:
        self._storage, self._interval_s = Storage(output_path), interval_s
        self._newest: Live | None = None
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)

    def show(self, live: Live) -> None:
        """What is to be written next; never waits. The first is written at once."""
        first, self._newest = self._newest is None, live
        if first:
            self._thread.start()

    def close(self, live: Live | None) -> None:
        """Ends the thread; `live` is the last to be written, None: nothing more, for the file is another driver's."""
        if self._newest is None:
            return
        self._newest, self._closed = live, True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            closed = self._closed  # before `_newest` is read: what was set with it is written
            if (live := self._newest) is not None:
                with suppress(StorageError):
                    self._storage.write(LIVE, to_json(asdict(replace(live, time=time()))))
            if closed:
                return
            self._wake.wait(self._interval_s)
