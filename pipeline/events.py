"""What the driver hears of its replicas: the events of dispatch.Pool. Counts and words, never rows."""

from dataclasses import dataclass

from pipeline.types import Assignment, UnitResult, WorkKey

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


@dataclass(frozen=True, slots=True)
class ReplicaActive:
    """Sent with every report of a replica."""

    replica: str
    beats: int
    """Changes whenever the replica got further: engine steps, rows and units finished."""
    doing: str
    """In a few words, for the operator of a job that stands still."""


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
