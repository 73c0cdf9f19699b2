"""Reads the statistics of rows, and the reasons why rows failed, each from a bounded random sample of parts.

For the statistics, one row group of each sampled part is read; for the reasons, all rows of each sampled part. Only the
columns that are needed are read. The samples are drawn with a fixed seed, so that a second report of the same output
says the same.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.error_kinds import ErrorCount, ErrorKinds
from pipeline.output.part import GROUP_ROWS
from pipeline.report.facts import Unit
from pipeline.storage.storage import Storage

PARTS_READ, ROWS_READ = 200, 1_000_000
"""Largest number of parts, and of rows, in a sample; a part counts with at most GROUP_ROWS rows. The limit that is
reached first bounds the time and the memory of a report."""
THREADS = 4
"""Number of parts that are read at the same time."""
BATCH_ROWS = 16_384
"""Number of rows that are decoded at a time."""
SEED = 0
"""Seed of the random choice of parts and row groups."""
STEPS_SHOWN = 64
"""Largest number of steps per block that is counted; a block with more steps counts as one with this many."""
MEASURES = (
    *("tokens_per_forward", "prompt_tokens", "completion_tokens", "latency_s", "tokens_per_s", "batch_rows"),
    *("mean_confidence", "forced_commits", "repetition", "queue_s", "prefill_s", "denoise_s", "commit_s"),
)
"""Columns of the output that are measures of a row: the report shows their distributions over the sampled rows."""
_READ = ("finish_reason", "steps_per_block", *MEASURES)
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """The statistics of sampled rows. Error rows are left out."""

    values: dict[str, Floats]
    """Values by measure (see MEASURES): one for each row in which the measure is neither null nor infinite nor NaN."""
    steps: Counts
    """`steps[n]`: number of blocks that took n steps, shape (STEPS_SHOWN + 1,)."""
    rows: int
    """Number of rows without errors that were read."""
    parts: int
    """Number of parts that they were read from."""
    of_parts: int
    """Number of all parts that have rows without errors."""
    unreadable: int
    """Number of sampled parts that could not be read."""


@dataclass(frozen=True, slots=True)
class Errors:
    """The reasons why rows failed, counted in all parts with error rows or in a sample of them."""

    kinds: tuple[ErrorCount, ...]
    """The kinds of errors with their numbers of rows, the most frequent kind first."""
    parts: int
    """Number of parts that were read."""
    of_parts: int
    """Number of all parts that have error rows."""


def read_sample(storage: Storage, units: Sequence[Unit]) -> Sample:
    """Return the statistics of rows without errors, from one row group of each sampled part.

    Parts that cannot be read are left out and counted (see Sample.unreadable).
    """
    good = [unit for unit in units if unit.totals.ok]
    drawn = _draw(good)
    found = _each(lambda unit: _read_statistics(storage, unit), drawn)
    values = {
        name: np.concatenate([np.zeros(0, np.float32), *(part[name] for part, _, _ in found)]) for name in MEASURES
    }
    steps = sum((counts for _, counts, _ in found), np.zeros(STEPS_SHOWN + 1, np.int64))
    return Sample(values, steps, sum(rows for *_, rows in found), len(found), len(good), len(drawn) - len(found))


def read_errors(storage: Storage, units: Sequence[Unit]) -> Errors:
    """Return the kinds of errors in the parts that have error rows, or in a sample of these parts if they are many.

    Parts that cannot be read are left out.
    """
    failed = [unit for unit in units if unit.totals.errors]
    drawn = _draw(failed)
    found = _each(lambda unit: _read_kinds(storage, unit), drawn)
    kinds = ErrorKinds()
    for of_part in found:
        kinds.merge(of_part)
    return Errors(kinds.counts(), len(found), len(failed))


def _draw(units: Sequence[Unit]) -> list[Unit]:
    """Return a random sample of the units within the limits PARTS_READ and ROWS_READ; all units if they are few."""
    mixed = random.Random(SEED).sample(units, min(len(units), PARTS_READ))
    drawn: list[Unit] = []
    rows = 0
    for unit in mixed:
        if drawn and rows + min(unit.totals.rows, GROUP_ROWS) > ROWS_READ:
            break
        drawn.append(unit)
        rows += min(unit.totals.rows, GROUP_ROWS)
    return drawn


def _each(read: Callable[[Unit], T], units: Sequence[Unit]) -> list[T]:
    """Return the results of `read` for the units in their order, without those whose part cannot be read."""

    def try_one(unit: Unit) -> list[T]:
        # the part is damaged or lacks columns: `verify` reports that
        with suppress(pa.ArrowException, OSError, ValueError, LookupError):
            return [read(unit)]
        return []

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for one in pool.map(try_one, units) for found in one]


@contextmanager
def _open(storage: Storage, unit: Unit) -> Iterator[pq.ParquetFile]:
    """Open the part of a unit so that the checksums of its pages are checked."""
    with (
        storage.open(unit.part.name, unit.part.size) as source,
        pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True) as file,
    ):
        yield file


def _read_statistics(storage: Storage, unit: Unit) -> tuple[dict[str, Floats], Counts, int]:
    """Return (values by measure, blocks by number of steps, rows) of a random row group, without error rows."""
    values: dict[str, list[Floats]] = {name: [np.zeros(0, np.float32)] for name in MEASURES}
    steps, rows = np.zeros(STEPS_SHOWN + 1, np.int64), 0
    with _open(storage, unit) as file:
        group = random.Random(f"{SEED} {unit.id}").randrange(max(1, file.num_row_groups))
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(_READ), use_threads=False):
            good = batch.filter(pc.not_equal(batch["finish_reason"], pa.scalar("error")))
            rows += good.num_rows
            for name in MEASURES:
                numbers = good[name].drop_null().cast(pa.float32(), safe=False).to_numpy()
                values[name].append(numbers[np.isfinite(numbers)])
            taken: Any = pc.list_flatten(good["steps_per_block"]).drop_null().cast(pa.int64()).to_numpy()
            steps += np.bincount(np.clip(taken, 0, STEPS_SHOWN), minlength=STEPS_SHOWN + 1)
    return {name: np.concatenate(chunks) for name, chunks in values.items()}, steps, rows


def _read_kinds(storage: Storage, unit: Unit) -> tuple[ErrorCount, ...]:
    """Return the kinds of errors in all rows of a part, each with an example `file#row: text`."""
    kinds, columns = ErrorKinds(), ["error", "source_file", "source_row"]
    with _open(storage, unit) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            bad = batch.filter(pc.is_valid(batch["error"]))
            for row in bad.to_pylist():
                kinds.add(f"{row['source_file']}#{row['source_row']}", str(row["error"]))
    return kinds.counts()
