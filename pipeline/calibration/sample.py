"""Draws the sample that a calibration generates: a few rows of the job's input that represent all of its rows.

Rows are read from random places of the input, and their prompts are tokenised. The rows are ordered by prompt length
and cut into strata of equal size, and the same number of rows is drawn from each stratum. So long prompts have their
true share in the sample. All rows have almost the same weight, because the numbers differ by at most one row. The same
seed gives the same sample.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from model.requests import GenerationParams
from pipeline.config.job import Job
from pipeline.core.errors import InputError, RequestError
from pipeline.core.types import Piece, WorkUnit
from pipeline.input.row_settings import with_settings
from pipeline.input.unit_reader import UnitData, UnitReader
from pipeline.planning.plan import Plan
from pipeline.prompts.encoder import EncoderLike
from pipeline.storage.storage import split_url
from pipeline.storage.urls import safe_url

STRATA = 8
"""Maximum number of strata; a sample of fewer rows has one stratum per row."""
PLACES = 32
"""Maximum number of places in the input at which rows are read. Each place costs a few requests to the storage."""
ROWS_READ, ROWS_READ_FOR_EACH = 1024, 8
"""Rows to read in all, and rows to read per row of the sample; the larger number counts. So many are needed to know the
distribution of prompt lengths."""
REACH_BYTES = 64 << 20
"""Maximum uncompressed bytes of a row group that are decoded before the rows that are wanted. A row group is decoded
from its beginning, so a place further into it is moved to an earlier row."""
READ_CHARS = 128 << 20
"""Number of characters of usable prompts after which no further place is read, to limit the memory."""
REASONS = 3
"""Maximum number of reasons for unusable rows that are reported."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row of the sample: its prompt, its settings, and its weight."""

    key: str
    """`<source_file>#<source_row>`, as in the job. It is part of the seed with which tokens are sampled."""
    id: str
    """The id that the row has in the output, as text."""
    prompt: str
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    """The generation settings of the calibration for this row, with those that columns of the input set. The mode, the
    steps and mostly the threshold are replaced by those of a point."""
    keeps_threshold: bool = False
    """Whether a column of the input sets the confidence threshold of this row, so that points do not change it."""
    weight: float = 0.0
    """The share of all usable rows that this row represents."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """A group of the usable rows that were read, with prompts of similar length."""

    shortest: int
    """Number of tokens of the shortest prompt."""
    longest: int
    """Number of tokens of the longest prompt."""
    share: float
    """Share of this group in all usable rows that were read."""
    rows: int
    """Number of rows of the sample that were drawn from this group."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The sample, and how it was drawn."""

    rows: tuple[SampleRow, ...]
    """The rows in random order."""
    strata: tuple[Stratum, ...]
    """The strata, from the shortest prompts to the longest."""
    read: int
    """Number of different rows that were read from the input to draw the sample from."""
    bad: int
    """Number of these rows that cannot be generated, for example because they have no prompt."""
    reasons: tuple[tuple[str, int], ...]
    """The most frequent reasons why rows cannot be generated, each with its number of rows."""
    places: int
    """Number of places in the input at which rows were read."""
    shifted: int
    """Number of these places that were moved towards the beginning of a large row group (see REACH_BYTES)."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weights of the rows, in their order. Their sum is 1."""
        return tuple(row.weight for row in self.rows)

    @property
    def good_share(self) -> float:
        """Return the share of the rows read that can be generated."""
        return 1 - self.bad / self.read


class _Draw:
    """Collects the rows that are read, separated into rows that can be generated and rows that cannot."""

    def __init__(self, encoder: EncoderLike, params: GenerationParams, room: int) -> None:
        self._encoder, self._params, self._room = encoder, params, room
        self.good: dict[str, SampleRow] = {}
        """The rows that can be generated, by row key."""
        self.bad: dict[str, str] = {}
        """The reason why a row cannot be generated, by row key."""
        self.characters = 0
        """Number of characters in the prompts of `good`."""

    def take(self, data: UnitData) -> None:
        """Add the rows that were read at one place. A row may be there already, because a place that was moved can
        overlap another; it counts once."""
        ids = data.columns["id"]
        for row, tokens in zip(data.rows, self._encoder.encode(data.rows), strict=True):
            try:
                params = with_settings(self._params, row.settings)
            except RequestError as error:
                params, reason = self._params, str(error)
            else:
                params = replace(params, max_new_tokens=min(params.max_new_tokens, self._params.max_new_tokens))
                reason = row.error or self._flaw(tokens, params)
            if reason:
                self.bad[row.key] = reason
                continue
            prompt = row.prompt or ""
            if row.key not in self.good:
                self.characters += len(prompt)
            row_id = str(ids[row.index].as_py())
            keeps = any(setting.name == "confidence_threshold" for setting in row.settings)
            self.good[row.key] = SampleRow(row.key, row_id, prompt, tuple(tokens), params, keeps)

    def _flaw(self, tokens: Sequence[int], params: GenerationParams) -> str:
        """Return the reason why a row with these prompt tokens cannot be generated, or "" if it can."""
        if not tokens:
            return "the prompt has no tokens"
        too_long = len(tokens) + params.max_new_tokens > self._room
        return f"prompt and completion exceed the context of {self._room} tokens" if too_long else ""


def draw_sample(
    job: Job, plan: Plan, encoder: EncoderLike, params: GenerationParams, room: int, size: int, seed: int = 0
) -> Sample:
    """Return a sample of `size` rows of the job's input, or of all usable rows that were read if these are fewer.

    `params`: the job's settings; no row gets more new tokens than they allow. `room`: maximum number of tokens of a
    prompt and its completion together. Raises InputError if none of the rows read can be generated or if the input
    cannot be decoded, StorageError if it cannot be reached.
    """
    rng = random.Random(seed)
    reader = UnitReader(job.input, plan.prompts)
    draw = _Draw(encoder, params, room)
    places = shifted = 0
    try:
        for unit, moved in _places(
            plan, job.input.columns_with(plan.prompts.columns), max(ROWS_READ, ROWS_READ_FOR_EACH * size), rng
        ):
            draw.take(reader.read(unit))
            places, shifted = places + 1, shifted + moved
            if draw.characters > READ_CHARS:
                break
    finally:
        reader.close()
    reasons = tuple(Counter(draw.bad.values()).most_common(REASONS))
    read = len(draw.good) + len(draw.bad)
    if not draw.good:
        why = "; ".join(f"{count:,} x {reason}" for reason, count in reasons)
        raise InputError(f"input {safe_url(job.input.path)}: none of the {read:,} rows read can be generated: {why}")
    rows, strata = _stratify(list(draw.good.values()), size, rng)
    return Sample(rows, strata, read, len(draw.bad), reasons, places, shifted)


def _places(plan: Plan, columns: Container[str], wanted: int, rng: random.Random) -> Iterator[tuple[WorkUnit, bool]]:
    """Yield (range of rows as a work unit, whether it was moved) for up to PLACES ranges drawn at random.

    Together the ranges have about `wanted` rows. A range is moved to an earlier place in its row group if reaching it
    would decode too much. If the plan has at most `wanted` rows, all of its units are yielded whole.
    """
    if plan.rows <= wanted:
        yield from ((unit, False) for unit in plan.units)
        return
    span = -(-wanted // PLACES)
    ends = list(accumulate(-(-unit.row_count // span) for unit in plan.units))
    for number in rng.sample(range(ends[-1]), min(PLACES, ends[-1])):
        which = bisect_right(ends, number)
        unit = plan.units[which]
        offset = span * (number - (ends[which - 1] if which else 0))
        part = unit.part(offset, offset + span)
        if len(part.pieces) > 1:
            yield part, False  # its files are small
            continue
        piece = part.pieces[0]
        near = _within_reach(piece, columns, rng)
        moved = replace(piece, first_row=near)
        yield WorkUnit(unit.id, (moved,)), moved != piece


def _within_reach(piece: Piece, columns: Container[str], rng: random.Random) -> int:
    """Return the row of the file to start reading at: the piece's first one, or a random earlier row of its row group
    if more than REACH_BYTES would have to be decoded before that. If the footer cannot be read, return the first."""
    first, count = piece.first_row, piece.row_count
    storage, name = split_url(piece.file)
    try:
        with storage.open(name, piece.size) as source:
            metadata = pq.read_metadata(source)
    except (pa.ArrowException, OSError, ValueError):
        return first  # reading the rows will report the error
    start = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if first < start + group.num_rows:
            chunks = [group.column(number) for number in range(group.num_columns)]
            needed = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
            size = sum(chunk.total_uncompressed_size for chunk in needed) or 1
            reach = REACH_BYTES * group.num_rows // size
            if first - start <= reach or group.num_rows <= count:
                return first
            return start + rng.randrange(max(1, min(reach, group.num_rows - count)))
        start += group.num_rows
    return first


def _stratify(
    rows: list[SampleRow], size: int, rng: random.Random
) -> tuple[tuple[SampleRow, ...], tuple[Stratum, ...]]:
    """Cut the rows into strata of equal size by prompt length. Return `size` rows drawn from them, and the strata.

    The rows are in random order and have their weights.
    """
    size = min(size, len(rows))
    ranked = sorted(rows, key=lambda row: (len(row.prompt_ids), rng.random()))
    count = min(STRATA, size)
    drawn: list[SampleRow] = []
    strata = []
    for number in range(count):
        group = ranked[len(rows) * number // count : len(rows) * (number + 1) // count]
        wanted = size * (number + 1) // count - size * number // count
        share = len(group) / len(rows)
        drawn += [replace(row, weight=share / wanted) for row in rng.sample(group, wanted)]
        strata.append(Stratum(len(group[0].prompt_ids), len(group[-1].prompt_ids), share, wanted))
    rng.shuffle(drawn)
    return tuple(drawn), tuple(strata)
