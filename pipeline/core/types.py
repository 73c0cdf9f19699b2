"""The pipeline's carriers: what is handed from one stage to the next. Frozen, plain, a field a line."""

from dataclasses import dataclass, field

from model.requests import Completion


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A range of rows of one input file: what is dispatched, retried and published as one part."""

    id: str
    """Stable: depends on the file's relative name and the first row alone. Used in the part's name."""
    file: str
    """Path or URL that opens the file."""
    name: str
    """The file's path relative to the input root, with forward slashes: what `source_file` and row keys carry."""
    first_row: int
    row_count: int
    size: int = -1
    """Bytes of the file when the plan was made; -1: unknown, so that no change of it is noticed."""
    stamp: str = ""
    """Its FileInfo.stamp then."""
    expected_work: float = 0.0
    """Compared with other units (pipeline.planning.cost); 0: unknown."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit, or a range of its rows, as a replica gets it."""

    unit: WorkUnit
    attempt: int = 1
    """Number of this try of the unit, from 1: what rows made by it carry in `attempt`."""
    rows: tuple[int, int] | None = None
    """Positions inside the unit, the second excluded. The rows of a range end in segments alone (RangeDone); None: the
    whole unit, whose part is published."""
    losses: int = 0
    """Replicas that were lost with exactly these rows."""
    early_losses: int = 0
    """Of a lone row: replicas that were lost before they began to generate it."""
    failures: int = 0
    """Times that reading or publishing failed, on replicas that lived on."""
    condemned: str | None = None
    """Why the one row of this range is not generated: it becomes an error row with this text."""

    @property
    def key(self) -> "WorkKey":
        """What tells it from all others that are under way."""
        return self.unit.id, self.rows

    @property
    def span(self) -> tuple[int, int]:
        """Positions of its rows inside the unit, the second excluded."""
        return self.rows or (0, self.unit.row_count)

    @property
    def lone(self) -> bool:
        """Whether it is a range of one row, and so one that is alone on its replica; a unit of one row need not be."""
        return self.rows is not None and self.rows[1] - self.rows[0] == 1

    @property
    def suspect(self) -> bool:
        """Whether one of its rows may be what kills replicas. It gets a replica of its own, and what is finished of it
        is flushed at once."""
        return self.losses > 0 or self.rows is not None


WorkKey = tuple[str, tuple[int, int] | None]
"""Unit id and range: the key of an Assignment."""


@dataclass(frozen=True, slots=True)
class RowSetting:
    """A generation setting that a row brings along."""

    name: str
    """Field of model.requests.GenerationParams."""
    column: str
    """Where it stood: errors name it."""
    value: int | float | tuple[str, ...]
    """Possible, as far as GenerationParams can tell."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input row, ready to generate or already known to be bad (then `error` says why and `prompt` is None)."""

    key: str
    """`<source_file>#<source_row>`: unique in the job, seeds the row's sampling, the default id."""
    index: int
    """Position inside the unit."""
    source_row: int
    """Row number in the source file, from 0."""
    prompt: str | None
    error: str | None = None
    settings: tuple[RowSetting, ...] = ()
    """Those that replace the job's."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """One output row before its id and carried columns are joined on by `index`."""

    index: int
    completion: Completion
    """Where the row was generated again: of the try that is kept, with the seconds of all."""
    mode: str
    """That made the completion."""
    attempt: int
    """The unit's, and one more for each time that the row was generated again."""
    replica: str
    repetition: float | None = None
    """Share of the completion that is a loop (pipeline.core.repetition); None for an error row without tokens."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts that add up: of a unit, a replica, a job."""

    rows: int = 0
    ok: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    denoiser_forwards: int = 0
    duplicate_ids: int = 0
    """Within units; the manifest adds those across units."""
    null_ids: int = 0
    degenerate: int = 0
    """Rows whose completion is a loop for the most part (pipeline.core.repetition.DEGENERATE)."""
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
    """What a replica reports of a published unit; the commit record holds the same."""

    unit_id: str
    totals: Totals
    seconds: float
    """From the unit's start on the replica to its part being published."""
    sha256: str
    """Of the part's bytes; "" where only its footer was read (Ledger.finished)."""
    replica: str
    attempt: int
    published_by_other: bool = False
    """Another attempt's part was there first: this one's was dropped, and the numbers are those of the part."""
