"""What the driver hears of its replicas: the events of dispatch.Pool. Counts and words, never rows."""

from dataclasses import dataclass

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.types import Assignment, UnitResult, WorkKey

WARNING = "warning: "
"""How the text of a note begins that the manifest is to list."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded the model and takes units."""

    replica: str


@dataclass(frozen=True, slots=True)
class UnitProgress:
    """Where an assignment stands: counts since its attempt began, not since the last report.

    So a repeated or lost report changes nothing, and what a lost replica had reported is taken back with it.
    """

    replica: str
    key: WorkKey
    rows: int
    """Finished, those that an earlier attempt left in segments included."""
    errors: int
    tokens: int
    """Completion tokens of these rows."""
    kept_rows: int = 0
    """Of `rows`, those that stand in segments of earlier attempts and were not generated again."""
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnitDone:
    """A unit's part is published."""

    result: UnitResult
    kept_rows: int = 0
    """Of its rows, those that this attempt found in segments."""
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RangeDone:
    """All rows of a range stand in segments."""

    replica: str
    key: WorkKey


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A unit could not be read or published; the replica lives on and has let go of it."""

    replica: str
    work: Assignment
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRoom:
    """How much of an engine is in use, and what it has done since its start."""

    slots_used: int = 0
    slots: int = 0
    """Those for common prefixes included; 0: not known."""
    pages_used: int = 0
    pages: int = 0
    """Of the context cache."""
    prefill_tokens: int = 0
    padded_tokens: int = 0
    """The prefill tokens with every row of a forward as long as the longest."""
    preemptions: int = 0
    """Rows put back to the queue because pages ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """What a replica has done since its start, and what it holds now. Counts, never a prompt or a completion.

    Rows count when they end, those that segments held already never, so the counts of a replica only grow.
    """

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    """Of completions."""
    forwards: int = 0
    """Of the denoiser, added up over the rows that took part in them."""
    batched: int = 0
    """Rows that the engine computed, which a bad row is not."""
    batch_rows: float = 0.0
    """Added up over these: the mean number of rows computed together."""
    error_kinds: tuple[ErrorCount, ...] = ()
    forward_retries: int = 0
    """Rows submitted again after a forward that failed."""
    loop_retries: int = 0
    """Rows generated again because their completion was a loop."""
    storage_retries: int = 0
    """Readings, flushes and publications that failed and were tried again."""
    queue: int = 0
    """Rows that are read and in no slot of the engine yet."""
    active: int = 0
    """Rows in slots."""
    max_rows: int = 0
    unsaved_rows: int = 0
    """Finished, and in no segment yet."""
    unsaved_s: float = 0.0
    """How long the oldest of them may have been finished: since the last flush of its unit."""
    room: EngineRoom = EngineRoom()


@dataclass(frozen=True, slots=True)
class ReplicaActive:
    """Sent with every report of a replica."""

    replica: str
    beats: int
    """Changes whenever the replica got further: engine steps, rows and units finished."""
    doing: str
    """In a few words, for the operator of a job that stands still."""
    stats: ReplicaStats | None = None


@dataclass(frozen=True, slots=True)
class ReplicaNote:
    """Something that the operator should know of."""

    replica: str
    text: str

    @property
    def warning(self) -> str | None:
        """What the manifest is to list; None where it is a note for the operator alone."""
        return self.text.removeprefix(WARNING) if self.text.startswith(WARNING) else None


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica is gone, with all that it held."""

    replica: str
    reason: str
    refused: bool = False
    """It would not start, with one of the project's own errors: another one would not either."""
    excused: bool = False
    """It was told to leave (SIGTERM, as a spot notice sends it) and did: no row of its is suspected."""


Event = ReplicaReady | UnitProgress | UnitDone | RangeDone | UnitFailed | ReplicaActive | ReplicaNote | ReplicaLost
