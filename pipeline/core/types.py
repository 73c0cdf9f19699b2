"""Defines the plain, frozen data classes that the packages of the pipeline hand to each other."""

from dataclasses import dataclass, field

from model.requests import Completion


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A range of rows of one input file that is dispatched, retried and published as one part."""

    id: str
    """A stable id that depends only on the file's relative name and the first row. The part's name contains it."""
    file: str
    """The path or URL that opens the file."""
    name: str
    """The file's path relative to the input root, with forward slashes. Column `source_file` and row keys hold it."""
    first_row: int
    row_count: int
    size: int = -1
    """The size of the file in bytes when the plan was made. -1 means unknown: a change of the file is not noticed."""
    stamp: str = ""
    """The FileInfo.stamp of the file when the plan was made."""
    expected_work: float = 0.0
    """The expected work in tokens, for comparison with other units (pipeline.planning.cost); 0 if unknown."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit, or a range of its rows, that is given to a replica."""

    unit: WorkUnit
    attempt: int = 1
    """The number of this attempt at the unit, from 1. Rows made by it carry it in `attempt`."""
    rows: tuple[int, int] | None = None
    """First and end position of a range inside the unit, end excluded; None for the whole unit. The rows of a range go
    to segments only (RangeDone), while a whole unit is published as a part."""
    losses: int = 0
    """The number of replicas that were lost while they held exactly these rows."""
    early_losses: int = 0
    """If this is a range of one row: the number of replicas that were lost before they began to generate it."""
    failures: int = 0
    """The number of times that reading or publishing failed on a replica that stayed alive."""
    condemned: str | None = None
    """The error text of the single row in this range if it is given up: it becomes an error row without being
    generated. None for all other work."""

    @property
    def key(self) -> "WorkKey":
        """Return the key that distinguishes it from all other assignments under way."""
        return self.unit.id, self.rows

    @property
    def span(self) -> tuple[int, int]:
        """Return the first and end position of its rows inside the unit, end excluded."""
        return self.rows or (0, self.unit.row_count)

    @property
    def lone(self) -> bool:
        """Return True if it is a range of one row, which is alone on its replica. A whole unit of one row is not."""
        return self.rows is not None and self.rows[1] - self.rows[0] == 1

    @property
    def suspect(self) -> bool:
        """Return True if one of its rows may be killing replicas. It then gets a replica of its own, and its finished
        rows are flushed at once."""
        return self.losses > 0 or self.rows is not None


WorkKey = tuple[str, tuple[int, int] | None]
"""The key of an Assignment: the unit id, and the range or None for the whole unit."""


@dataclass(frozen=True, slots=True)
class RowSetting:
    """A generation setting that comes from the row instead of the job."""

    name: str
    """The name of the field of model.requests.GenerationParams."""
    column: str
    """The input column that holds it; error texts name this column."""
    value: int | float | tuple[str, ...]
    """The value, which GenerationParams accepts."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input row, ready to generate or known to be bad (then `error` gives the reason and `prompt` is None)."""

    key: str
    """`<source_file>#<source_row>`. It is unique in the job, seeds the row's sampling and is the default id."""
    index: int
    """The position inside the unit, from 0."""
    source_row: int
    """The row number in the source file, from 0."""
    prompt: str | None
    error: str | None = None
    settings: tuple[RowSetting, ...] = ()
    """The settings that replace those of the job for this row."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """One output row before its id and carried columns are added by `index`."""

    index: int
    completion: Completion
    """The completion. If the row was generated several times, it is the one that is kept, with the seconds of all."""
    mode: str
    """The generation mode that made the completion."""
    attempt: int
    """The attempt of the unit, plus one for each time that the row was generated again."""
    replica: str
    repetition: float | None = None
    """The share of the completion that is a loop (pipeline.core.repetition); None for an error row without tokens."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts of a unit, a replica or a job; they can be added up."""

    rows: int = 0
    ok: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    denoiser_forwards: int = 0
    duplicate_ids: int = 0
    """Rows that repeat the id of another row in the same unit. Only the manifest also compares ids across units."""
    null_ids: int = 0
    degenerate: int = 0
    """Rows whose `repetition` is at least pipeline.core.repetition.DEGENERATE."""
    finish_reasons: dict[str, int] = field(default_factory=dict)

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
    """The report of a replica on a published unit. The commit record holds the same values."""

    unit_id: str
    totals: Totals
    seconds: float
    """Seconds from when the replica had read the unit until its part was published."""
    sha256: str
    """The SHA-256 of the part's bytes; "" if only the footer of the part was read (Ledger.finished)."""
    replica: str
    attempt: int
    published_by_other: bool = False
    """Whether another attempt had published the part first. This attempt's part was then dropped, and all values
    describe the published one."""
