"""Draws the sample of prompts that a calibration runs: a few rows of the job's input that represent all of its rows.

Rows are read from random places of the input, and their prompts are tokenized. The rows are ordered by prompt length
and cut into strata of equal size, and the same number of rows is drawn from each stratum. So long prompts have their
true share in the sample, and all rows have almost the same weight (the numbers differ by one row at most). The same
seed gives the same sample.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from model.requests import GenerationParams
from pipeline.config.job import Job
from pipeline.core.errors import InputError, RequestError
from pipeline.core.types import WorkUnit
from pipeline.input.row_settings import with_settings
from pipeline.input.unit_reader import UnitData, UnitReader
from pipeline.planning.plan import Plan
from pipeline.storage.storage import split_url
from pipeline.storage.urls import safe_url

STRATA = 8
PLACES = 32
"""Places in the input at which rows are read. Each place costs a few requests to the storage."""
ROWS_READ, ROWS_READ_FOR_EACH = 1024, 8
"""Minimum number of rows to read, and rows to read for each row of the sample; the larger number counts. So many are
needed to know how prompt lengths are distributed."""
REACH_BYTES = 64 << 20
"""Maximum size of the part of a row group that is decoded before the rows that are wanted, in uncompressed bytes. A row
group is decoded from its beginning, so a place further into it is moved to an earlier row."""
READ_CHARS = 128 << 20
"""Characters of prompts after which no further place is read."""
REASONS = 3


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of the sample."""

    key: str
    """`<source_file>#<source_row>`, as in the job. It seeds the sampling of tokens."""
    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    """The generation settings that the job would use for this row."""
    keeps_threshold: bool = False
    """Whether a column of the input sets the confidence threshold of this row."""
    weight: float = 0.0
    """The share of all rows that this row represents."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """A group of rows with prompts of similar length."""

    shortest: int
    """Tokens of the shortest prompt."""
    longest: int
    share: float
    """Share that these rows have of all rows that can be generated."""
    rows: int
    """Rows of the sample that were drawn from this group."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows of the sample in random order, and how they were found."""

    rows: tuple[SampleRow, ...]
    strata: tuple[Stratum, ...]
    read: int
    """Rows that were read."""
    bad: int
    """Number of the rows read that cannot be generated."""
    reasons: tuple[tuple[str, int], ...]
    """The most frequent reasons why rows cannot be generated, each with its number of rows."""
    places: int
    shifted: int
    """Places that were moved towards the beginning of a large row group (see REACH_BYTES)."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weights of the rows, in their order. Their sum is 1."""
        return tuple(row.weight for row in self.rows)

    @property
    def good_share(self) -> float:
        """Return the share of the rows read that can be generated."""
        return 1 - self.bad / self.read


class TokenizerLike(Protocol):
    """The part of a checkpoint's tokenizer that sampling needs."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...


class _Draw:
    """The rows that were read so far, separated into rows that can be generated and rows that cannot."""

    def __init__(self, tokenizer: TokenizerLike, params: GenerationParams, room: int) -> None:
        self._tokenizer, self._params, self._room = tokenizer, params, room
        self.good: dict[str, SampleRow] = {}
        self.bad: dict[str, str] = {}
        """The reason why a row cannot be generated, by row key."""
        self.characters = 0

    def take(self, data: UnitData) -> None:
        """Add the rows of one place. Some of them may be known already, because a place that was moved can overlap
        another."""
        ids = data.columns["id"]
        texts = [row.prompt or "" for row in data.rows]
        for row, tokens in zip(data.rows, self._tokenizer.encode_batch(texts), strict=True):
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
        if not tokens:
            return "the prompt has no tokens"
        too_long = len(tokens) + params.max_new_tokens > self._room
        return f"prompt and completion exceed the context of {self._room} tokens" if too_long else ""


def draw_sample(
    job: Job, plan: Plan, tokenizer: TokenizerLike, params: GenerationParams, room: int, size: int, seed: int = 0
) -> Sample:
    """Return a sample of at most `size` rows of the job's input, or of all rows if there are fewer.

    params: the job's settings; no row gets more new tokens than they allow. room: maximum number of tokens of a
    prompt and its completion together. Raises InputError if none of the rows read can be generated or if the input
    cannot be decoded, and StorageError if it cannot be reached.
    """
    rng = random.Random(seed)
    reader = UnitReader(job.input)
    draw = _Draw(tokenizer, params, room)
    places = shifted = 0
    try:
        for unit, moved in _places(plan, job.input.columns, max(ROWS_READ, ROWS_READ_FOR_EACH * size), rng):
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
    """Yield up to PLACES different ranges of rows, each equally likely, as a work unit and whether it was moved. A
    range is moved to an earlier place in its row group if reaching it would decode too much. If the plan has at most
    `wanted` rows, yield all of its units whole instead."""
    if plan.rows <= wanted:
        yield from ((unit, False) for unit in plan.units)
        return
    span = -(-wanted // PLACES)
    ends = list(accumulate(-(-unit.row_count // span) for unit in plan.units))
    for number in rng.sample(range(ends[-1]), min(PLACES, ends[-1])):
        which = bisect_right(ends, number)
        unit = plan.units[which]
        offset = span * (number - (ends[which - 1] if which else 0))
        first, count = unit.first_row + offset, min(span, unit.row_count - offset)
        near = _within_reach(unit, columns, first, count, rng)
        yield replace(unit, first_row=near, row_count=count), near != first


def _within_reach(unit: WorkUnit, columns: Container[str], first: int, count: int, rng: random.Random) -> int:
    """Return the row to start reading at: `first`, or a random earlier row of its row group if too much would have to
    be decoded before `first`."""
    storage, name = split_url(unit.file)
    try:
        with storage.open(name, unit.size) as source:
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
    """Return rows drawn at random from strata of equal size by prompt length, and the strata."""
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
