"""The user's own prompts that a calibration runs: few rows that stand for all of them, long ones and short ones alike.

Some rows are read from places spread at random over the input, and their prompts tokenised. Ordered by length they are
cut into strata of equal size, and from each stratum as many rows are drawn. So the sample needs no weights worth
speaking of (they differ by a row at most), holds the long prompts in their true share, and is the same for a seed.
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
"""Where rows are read; each costs a few requests to the store."""
ROWS_READ, ROWS_READ_FOR_EACH = 1024, 8
"""Rows read at least, and for each row of the sample: the lengths of so many say what share a stratum is."""
REACH_BYTES = 64 << 20
"""A row group is decoded from its beginning: a row this far into it is out of reach, and an earlier one is taken."""
READ_CHARS = 128 << 20
"""Of prompts: once there are so many, no further place is read."""
REASONS = 3


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of the sample."""

    key: str
    """`<source_file>#<source_row>`, as in the job: it seeds the sampling."""
    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    """As the job would generate it."""
    keeps_threshold: bool = False
    """Whether a column of the input says its confidence threshold."""
    weight: float = 0.0
    """The share of all rows that it stands for."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """Rows of about one length."""

    shortest: int
    """Prompt tokens."""
    longest: int
    share: float
    """Of all rows that can be generated."""
    rows: int
    """Of the sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows, in an order that is mixed, and how they were found."""

    rows: tuple[SampleRow, ...]
    strata: tuple[Stratum, ...]
    read: int
    """Rows that were read."""
    bad: int
    """Of these, rows that cannot be generated."""
    reasons: tuple[tuple[str, int], ...]
    """Why, the most frequent ones."""
    places: int
    shifted: int
    """Places that were out of reach in a large row group, and were moved towards its beginning."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the rows, in order; together 1."""
        return tuple(row.weight for row in self.rows)

    @property
    def good_share(self) -> float:
        """Share of the rows read that can be generated."""
        return 1 - self.bad / self.read


class TokenizerLike(Protocol):
    """What is needed of a checkpoint's tokenizer."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...


class _Draw:
    """The rows that were read."""

    def __init__(self, tokenizer: TokenizerLike, params: GenerationParams, room: int) -> None:
        self._tokenizer, self._params, self._room = tokenizer, params, room
        self.good: dict[str, SampleRow] = {}
        self.bad: dict[str, str] = {}
        """Why, by key."""
        self.characters = 0

    def take(self, data: UnitData) -> None:
        """The rows of a place; one that was moved may meet another one, so some may be here already."""
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
    """At most `size` rows of the job's input; all of them where it has fewer.

    params: the job's; no row gets more tokens than these allow. room: tokens that prompt and completion may have
    together. Raises InputError where no row that was read can be generated, and what reading raises.
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
    """Pieces of units, each as likely as any other, and whether one had to be moved; all of a small input, whole."""
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
    """Where to read instead of `first`, so that little of its row group has to be decoded before."""
    storage, name = split_url(unit.file)
    try:
        with storage.open(name, unit.size) as source:
            metadata = pq.read_metadata(source)
    except (pa.ArrowException, OSError, ValueError):
        return first  # reading it says what is wrong
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
    """Strata of equal size by prompt length, and rows from each at random."""
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
