"""Defines the units, rows and totals of a job, as frozen data classes that the folders of the pipeline share."""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate

from model.requests import Completion

UNIT_RULES = 2
"""The version of the rules by which new outputs cut their input into units. With version 1, a unit had rows of one file
only; outputs that were begun with it go on with it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of rows of one input file, as a part of a work unit."""

    file: str
    """The path or URL that opens the file."""
    name: str
    """The file's path relative to the input root, with forward slashes. Column `source_file` and row keys hold it."""
    first_row: int
    """The number of the piece's first row in the file, from 0."""
    row_count: int
    size: int = -1
    """The size of the file in bytes when the plan was made. -1 if unknown: then a change of the file is not noticed."""
    stamp: str = ""
    """The FileInfo.stamp of the file when the plan was made."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A list of pieces of input files that are dispatched, retried and published together, as one part."""

    id: str
    """A stable id that depends only on the name of the first piece's file and its first row. The name of the unit's
    part contains it."""
    pieces: tuple[Piece, ...]
    """At least one piece, in the order in which their rows stand in the part. A file occurs only once."""
    expected_work: float = 0.0
    """The expected work in tokens, for comparison with other units (pipeline.planning.cost); 0 if unknown."""
    rules: int = UNIT_RULES
    """The version of the rules by which the unit was cut (UNIT_RULES)."""
    row_count: int = field(init=False)
    starts: tuple[int, ...] = field(init=False)
    """The position of the first row of each piece in the unit, from 0."""

    def __post_init__(self) -> None:
        *starts, rows = accumulate((piece.row_count for piece in self.pieces), initial=0)
        object.__setattr__(self, "starts", tuple(starts))
        object.__setattr__(self, "row_count", rows)

    def locate(self, index: int) -> tuple[Piece, int]:
        """Return the piece that holds the row at position `index` (from 0) of the unit, and the row's number in the
        piece's file."""
        number = bisect_right(self.starts, index) - 1 if len(self.starts) > 1 else 0
        piece = self.pieces[number]
        return piece, piece.first_row + index - self.starts[number]

    def part(self, first: int, end: int) -> "WorkUnit":
        """Return the rows from position `first` to `end` (excluded) as a unit with the same id."""
        pieces = []
        for start, piece in zip(self.starts, self.pieces, strict=True):
            lower, upper = max(first - start, 0), min(end - start, piece.row_count)
            if lower < upper:
                pieces.append(replace(piece, first_row=piece.first_row + lower, row_count=upper - lower))
        return WorkUnit(self.id, tuple(pieces), self.expected_work, self.rules)

    def describe(self, first: int = 0, end: int | None = None) -> str:
        """Return the rows from position `first` to `end` (excluded; None for all) for messages: `a.parquet, rows 0 to
        9`, or `rows from a.parquet#3 to c.parquet#0, of 3 files`."""
        pieces = self.part(first, self.row_count if end is None else end).pieces
        head, tail = pieces[0], pieces[-1]
        last = tail.first_row + tail.row_count - 1
        if head is tail:
            return f"{head.name}, rows {head.first_row} to {last}"
        return f"rows from {head.name}#{head.first_row} to {tail.name}#{last}, of {len(pieces)} files"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Work for a replica: a unit or a range of its rows, with what happened to it before."""

    unit: WorkUnit
    attempt: int = 1
    """The number of this attempt at the unit, from 1. It gives column `attempt` of the rows that are generated."""
    rows: tuple[int, int] | None = None
    """First and end position (from 0) of a range inside the unit, end excluded; None for the whole unit. The rows of a
    range go to segments only (RangeDone); a whole unit is published as a part."""
    losses: int = 0
    """The number of replicas that were lost while they held exactly these rows, without excused losses
    (ReplicaLost.excused) and `early_losses`."""
    early_losses: int = 0
    """The number of replicas that were lost before rows of it were in their engine and for which it was not blamed: it
    is then a range of one row, or a whole unit that is no suspect."""
    failures: int = 0
    """The number of attempts at the unit that ended because it could not be read, published or saved, while the replica
    stayed alive (UnitFailed)."""
    condemned: tuple[tuple[int, str], ...] = ()
    """The rows of the unit that are given up, as (position, error text) in ascending order: they become error rows
    without being generated. Only whole units have some."""
    lost_in: tuple[str, ...] = ()
    """The slots in which replicas were lost that count in `losses`, once each. The next attempt at a suspect is made in
    another slot, if there is one."""

    @property
    def key(self) -> "WorkKey":
        """Return the key that distinguishes this assignment from all others that are in progress."""
        return self.unit.id, self.rows

    @property
    def span(self) -> tuple[int, int]:
        """Return the first and end position (from 0) of its rows inside the unit, end excluded."""
        return self.rows or (0, self.unit.row_count)

    @property
    def lone(self) -> bool:
        """Return True if this is a range of one row. A whole unit of one row is none."""
        return self.rows is not None and self.rows[1] - self.rows[0] == 1

    @property
    def control(self) -> bool:
        """Return True if this is no work on rows but a control: the replica generates a prompt, whose completion
        is thrown away. It is written as a range of no rows."""
        return self.rows is not None and self.rows[0] == self.rows[1]

    @property
    def suspect(self) -> bool:
        """Return True if one of its rows may be killing replicas: a replica was lost with it, or it is a range. It then
        gets a replica without other work, and its finished rows are flushed at once."""
        return self.losses > 0 or self.rows is not None


CONTROL = "control"
"""The id of the unit that a control with the fixed prompt names. A control with the id of another unit generates a row
of that unit once more that segments hold."""
ALONE = "while it generated this row alone"
"""Words in the error text of every condemned row (Assignment.condemned)."""
WorkKey = tuple[str, tuple[int, int] | None]
"""The key of an Assignment: the unit id, and the range or None for the whole unit."""


@dataclass(frozen=True, slots=True)
class RowSetting:
    """A generation setting of one row, from a column of the input. It replaces the job's setting for this row."""

    name: str
    """The name of the field of model.requests.GenerationParams."""
    column: str
    """The input column that the value comes from; error texts name it."""
    value: int | float | tuple[str, ...]
    """The value from the cell. `read_settings` returns only values that GenerationParams accepts."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input row as it is read: either with a prompt, or unusable, and then `error` gives the reason."""

    key: str
    """The row key, `<source_file>#<source_row>`. It is unique in the job, part of the seed of the row's sampling, and
    the default id."""
    index: int
    """The position inside the unit, from 0."""
    source_row: int
    """The row number in the source file, from 0."""
    prompt: str | None
    """The text of the prompt; None if the row cannot be used."""
    error: str | None = None
    """The reason why the row cannot be used; None if it can."""
    settings: tuple[RowSetting, ...] = ()
    """The settings that replace those of the job for this row."""
    control: tuple[tuple[int, int], ...] = ()
    """The ranges of characters (start, end) of `prompt` that are control tokens, in ascending order. All other text is
    text, whatever it spells, unless input.special_tokens is `all`."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """One finished row without its id and carried columns, which are added when its part is built."""

    index: int
    """The position inside the unit, from 0."""
    completion: Completion
    """The completion. If the row was generated several times, it is the best one, with the summed seconds of all."""
    mode: str
    """The generation mode that made the completion."""
    attempt: int
    """The number of the unit's attempt, plus one for each further try of the row (`on_degenerate: retry`)."""
    replica: str
    repetition: float | None = None
    """The share of the completion that is a loop (pipeline.core.repetition); None for an error row without tokens."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts of finished rows of a unit, a replica or a job. Totals can be added with `+`."""

    rows: int = 0
    ok: int = 0
    """Rows without an error."""
    errors: int = 0
    """Error rows."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    denoiser_forwards: int = 0
    duplicate_ids: int = 0
    """Rows that repeat the id of another row in the same unit. Only the manifest also compares ids across units."""
    null_ids: int = 0
    """Rows whose id is null."""
    degenerate: int = 0
    """Rows whose `repetition` is at least pipeline.core.repetition.DEGENERATE."""
    finish_reasons: dict[str, int] = field(default_factory=dict)
    """The number of rows with each `finish_reason`."""

    def __add__(self, other: "Totals") -> "Totals":
        reasons = {
            k: self.finish_reasons.get(k, 0) + other.finish_reasons.get(k, 0)
            for k in {*self.finish_reasons, *other.finish_reasons}
        }
        return Totals(
            rows=self.rows + other.rows,
            ok=self.ok + other.ok,
            errors=self.errors + other.errors,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            denoiser_forwards=self.denoiser_forwards + other.denoiser_forwards,
            duplicate_ids=self.duplicate_ids + other.duplicate_ids,
            null_ids=self.null_ids + other.null_ids,
            degenerate=self.degenerate + other.degenerate,
            finish_reasons=reasons,
        )


@dataclass(frozen=True, slots=True)
class UnitResult:
    """The result of a unit that is published as a part. Its commit record holds all these values but the last one."""

    unit_id: str
    totals: Totals
    seconds: float
    """Seconds from when the replica had read the unit until its part was published."""
    sha256: str
    """The SHA-256 (hex) of the part's bytes; "" if only the footer of the part was read (Ledger.finished)."""
    replica: str
    """The name of the replica that made the part."""
    attempt: int
    """The number of the attempt that made the part."""
    published_by_other: bool = False
    """True if another attempt had published the part first. This attempt's part, if it made one, was then dropped, and
    all values describe the published one."""
