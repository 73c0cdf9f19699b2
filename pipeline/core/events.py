"""Defines the events that replicas send to the driver through a Pool. They hold counts and short texts, never rows."""

from dataclasses import dataclass

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.types import Assignment, UnitResult, WorkKey

WARNING = "warning: "
"""The prefix that marks the text of a note as a warning, which the manifest lists."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded the model and is ready to take units."""

    replica: str


@dataclass(frozen=True, slots=True)
class UnitProgress:
    """The progress of an assignment, in counts since its attempt began, not since the last report.

    A report that is repeated or lost therefore changes nothing, and the counts of a lost replica can be taken back.
    """

    replica: str
    key: WorkKey
    rows: int
    """Finished rows, including those that an earlier attempt left in segments."""
    errors: int
    tokens: int
    """Completion tokens of the finished rows."""
    kept_rows: int = 0
    """The part of `rows` that was found in segments of earlier attempts and not generated again."""
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnitDone:
    """The part of a unit has been published."""

    result: UnitResult
    kept_rows: int = 0
    """Rows of the unit that this attempt found in segments and did not generate."""
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RangeDone:
    """All rows of a range are in segments."""

    replica: str
    key: WorkKey


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A unit could not be read or published. The replica is still alive and no longer holds the unit."""

    replica: str
    work: Assignment
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRoom:
    """The capacity of an engine, the amount of it in use, and counts of its work since its start."""

    slots_used: int = 0
    slots: int = 0
    """All slots, including those for common prefixes; 0 if not known."""
    pages_used: int = 0
    pages: int = 0
    """All pages of the KV cache."""
    prefill_tokens: int = 0
    padded_tokens: int = 0
    """Prefill tokens including padding, that is, with every row of a forward as long as the longest."""
    preemptions: int = 0
    """The number of times that a row was put back to the queue because pages ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """Counts of the work that a replica has done since its start and of the work that it holds now.

    A row counts when it ends; rows that were already in segments do not count. Counts of work done therefore only grow.
    Prompts and completions are never included.
    """

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    """Completion tokens."""
    forwards: int = 0
    """Denoiser forwards, each counted once for every row that took part in it."""
    batched: int = 0
    """Rows that the engine computed. A row that was bad from the start is not among them."""
    batch_rows: float = 0.0
    """The sum of Completion.batch_rows over the `batched` rows; divided by `batched` it is the mean batch size."""
    error_kinds: tuple[ErrorCount, ...] = ()
    forward_retries: int = 0
    """Rows submitted again because a forward failed."""
    loop_retries: int = 0
    """Rows generated again because their completion was a loop."""
    storage_retries: int = 0
    """The number of times that reading, flushing or publishing failed at the storage, which is then usually retried."""
    queue: int = 0
    """Rows that have been read but hold no slot of the engine yet."""
    active: int = 0
    """Rows that hold a slot."""
    max_rows: int = 0
    unsaved_rows: int = 0
    """Finished rows that are neither in a segment nor part of a flush under way."""
    unsaved_s: float = 0.0
    """The longest time, in seconds, that such a row may have been finished: counted from the last flush of its unit."""
    room: EngineRoom = EngineRoom()


@dataclass(frozen=True, slots=True)
class ReplicaActive:
    """The activity of a replica, sent with every report."""

    replica: str
    beats: int
    """A number that changes whenever an engine step, a read, a flush or a publication has ended."""
    doing: str
    """A few words about the current work, for the operator of a job that makes no progress."""
    stats: ReplicaStats | None = None


@dataclass(frozen=True, slots=True)
class ReplicaNote:
    """A message from a replica to the operator."""

    replica: str
    text: str

    @property
    def warning(self) -> str | None:
        """Return the warning that the manifest is to list; None if the note is only for the operator."""
        return self.text.removeprefix(WARNING) if self.text.startswith(WARNING) else None


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica is gone, with all the work that it held."""

    replica: str
    reason: str
    refused: bool = False
    """Whether it failed to start with one of the project's own errors, so that another replica would fail as well."""
    excused: bool = False
    """Whether it was asked to leave (SIGTERM, for example before a spot instance ends) and did so. None of its rows is
    suspected of killing it."""


Event = ReplicaReady | UnitProgress | UnitDone | RangeDone | UnitFailed | ReplicaActive | ReplicaNote | ReplicaLost
