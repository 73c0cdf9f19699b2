"""Defines the events that tell the driver of a job what happens on its replicas.

The pool of replicas delivers them. They hold counts and short texts, never rows.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.types import Assignment, UnitResult, WorkKey

WARNING = "warning: "
"""The prefix of a ReplicaNote's text that makes it a warning, which the manifest lists."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded the model and is ready to take units."""

    replica: str
    max_rows: int = 0
    """The largest number of rows that its engine generates together, which says how many rows it needs at a time; 0 if
    not known. It stays if the engine lowers its limit later: the limit may rise again, and the rows that wait meanwhile
    cost little."""
    node: str = ""
    """The name of the machine that it runs on; "" if not known."""


@dataclass(frozen=True, slots=True)
class UnitProgress:
    """The progress of a replica with one assignment, in counts since its attempt began, not since the last report.

    A report that is repeated or lost therefore changes nothing, and the counts of a lost replica can be taken back.
    """

    replica: str
    key: WorkKey
    rows: int
    """Finished rows, including those that an earlier attempt left in segments."""
    errors: int
    """The error rows among them."""
    tokens: int
    """Completion tokens of the finished rows."""
    kept_rows: int = 0
    """The number of these rows that were found in segments of earlier attempts and are not generated again."""
    kept_tokens: int = 0
    """The completion tokens of the kept rows."""
    begun: bool = True
    """Whether rows of it may have been in slots of the engine. A replica reports this before it happens, so that it is
    known if a row kills the replica at once."""


@dataclass(frozen=True, slots=True)
class UnitDone:
    """The part of a unit has been published."""

    result: UnitResult
    kept_rows: int = 0
    """Rows that this attempt did not generate: those that it found in segments, or all if the unit had its part
    already when the attempt began."""
    kept_tokens: int = 0
    """The completion tokens of the kept rows."""


@dataclass(frozen=True, slots=True)
class RangeDone:
    """All rows of a range are in segments, or the unit of the range has its part already; for a control
    (Assignment.control): its prompt was generated."""

    replica: str
    key: WorkKey


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A replica could not read a unit or a range of it, publish the unit or save the range. The replica is still alive
    and no longer holds the work."""

    replica: str
    work: Assignment
    reason: str
    stage: Literal["read", "part", "save"] = "read"
    """read: its rows, or what is saved of them, could not be read. part: its part is broken or not this job's. save:
    its rows could not be saved, so that other units are likely to fail in the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRoom:
    """The slots and pages of an engine, how many of them are in use, and counts of its work since its start."""

    slots_used: int = 0
    slots: int = 0
    """All slots, including those for prefixes that prompts have in common; 0 if not known."""
    pages_used: int = 0
    pages: int = 0
    """All pages of the context cache; 0 if not known."""
    prefill_tokens: int = 0
    """Prompt tokens that were computed; those of a common prefix count once."""
    padded_tokens: int = 0
    """The same tokens with padding: every row of a forward counts as many tokens as the longest row in it."""
    preemptions: int = 0
    """The number of times that a row was preempted because pages or memory ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """Counts of the work that a replica has done since its start and of the work that it holds now.

    A row counts when it ends on this replica; rows that it found in segments do not count. Counts of work done
    therefore only grow. Prompts and completions are never included.
    """

    rows: int = 0
    """Rows that ended, error rows included."""
    errors: int = 0
    """Error rows among them."""
    controls: int = 0
    """The number of times that the prompt of a control was generated; these are not among `rows`."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Completion tokens."""
    forwards: int = 0
    """Denoiser forwards, each counted once for every row that took part in it."""
    batched: int = 0
    """Rows that took part in a forward after their prefill. A row without a usable prompt is not among them."""
    batch_rows: float = 0.0
    """The sum of Completion.batch_rows over the `batched` rows; divided by `batched` it is the mean number of rows in a
    forward."""
    error_kinds: tuple[ErrorCount, ...] = ()
    """The error rows by kind of error."""
    forward_retries: int = 0
    """The number of times that a row was submitted again because its forward failed."""
    loop_retries: int = 0
    """The number of times that a row was generated again because its completion was a loop. A row counts once for each
    further try."""
    storage_retries: int = 0
    """The number of reads of units, flushes and publications that failed at the storage. Most of them are tried
    again."""
    queue: int = 0
    """Rows that have been read but hold no slot of the engine yet."""
    active: int = 0
    """Rows that hold a slot."""
    max_rows: int = 0
    """The largest number of rows that the engine generates together now; it is lowered if memory runs out."""
    unsaved_rows: int = 0
    """Finished rows that are neither in a segment nor in a flush that is in progress."""
    unsaved_s: float = 0.0
    """The longest time, in seconds, that such a row may have been finished: the time since the last flush of its unit,
    or since the unit was read if there was none. 0 if no row is unsaved."""
    room: EngineRoom = EngineRoom()

    @property
    def generated(self) -> int:
        """Return how many rows and controls ended with a completion, which shows that the replica can generate."""
        return self.rows - self.errors + self.controls


@dataclass(frozen=True, slots=True)
class ReplicaActive:
    """The activity of a replica, sent with every report. From `beats` the driver sees whether it makes progress."""

    replica: str
    beats: int
    """A number that changes whenever an engine step, a read, a flush or a publication has ended, even if it failed."""
    doing: str
    """A text for the operator about the units that the replica reads, generates or publishes now, or `idle`."""
    stats: ReplicaStats | None = None
    """The counts of the replica; None if the report has none."""


@dataclass(frozen=True, slots=True)
class ReplicaNote:
    """A message to the operator, from a replica or from the driver about its work. It changes no state of the job."""

    replica: str
    text: str

    @property
    def warning(self) -> str | None:
        """Return the text without WARNING, for the list in the manifest; None if the note is no warning."""
        return self.text.removeprefix(WARNING) if self.text.startswith(WARNING) else None


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica has died, has left or did not start. The work that it held must be given to another one."""

    replica: str
    reason: str
    """Text of the error that ended it, or of the way in which it ended."""
    refused: bool = False
    """True if it failed to start with one of the project's own errors, so that another replica would fail as well."""
    excused: bool = False
    """True if it was asked to leave (SIGTERM, for example before a spot instance ends) and did so. None of its rows is
    then suspected of killing it."""


@dataclass(frozen=True, slots=True)
class SlotLeftOut:
    """The driver gives a slot, a place for one replica after the other, no rows any more, because the replicas there
    die before they generate one; or a replica there has generated a row again."""

    slot: str
    reason: str
    """A text for the operator; "" if the slot is used again."""


Event = (
    ReplicaReady
    | UnitProgress
    | UnitDone
    | RangeDone
    | UnitFailed
    | ReplicaActive
    | ReplicaNote
    | ReplicaLost
    | SlotLeftOut
)
