"""Reads the statistics of rows from a bounded sample of parts, and the reasons why rows failed.

For the statistics, one row group of each sampled part is read, and only the columns that are needed. The parts are
drawn with a fixed seed, so that a second report of the same output says the same.
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
BATCH_ROWS = 16_384
SEED = 0
STEPS_SHOWN = 64
"""Largest number of steps of a block that is counted; a block with more steps counts as one with this many."""
MEASURES = (
    *("tokens_per_forward", "prompt_tokens", "completion_tokens", "latency_s", "tokens_per_s", "batch_rows"),
    *("mean_confidence", "forced_commits", "repetition", "queue_s", "prefill_s", "denoise_s", "commit_s"),
)
_READ = ("finish_reason", "steps_per_block", *MEASURES)
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """The statistics of sampled rows that are not error rows."""

    values: dict[str, Floats]
    """Values of the rows by measure, without nulls."""
    steps: Counts
    """Number of blocks for each number of steps, shape (STEPS_SHOWN + 1,)."""
    rows: int
    parts: int
    of_parts: int
    """Number of all parts that have such rows."""
    unreadable: int
    """Number of sampled parts that could not be read."""


@dataclass(frozen=True, slots=True)
class Errors:
    """The reasons why rows failed, the most frequent first."""

    kinds: tuple[ErrorCount, ...]
    parts: int
    of_parts: int
    """Number of all parts that have error rows."""


def read_sample(storage: Storage, units: Sequence[Unit]) -> Sample:
    """Return the statistics of one row group of each sampled part. Unreadable parts are left out and counted."""
    good = [unit for unit in units if unit.totals.ok]
    drawn = _draw(good)
    found = _each(lambda unit: _read_statistics(storage, unit), drawn)
    values = {
        name: np.concatenate([np.zeros(0, np.float32), *(part[name] for part, _, _ in found)]) for name in MEASURES
    }
    steps = sum((counts for _, counts, _ in found), np.zeros(STEPS_SHOWN + 1, np.int64))
    return Sample(values, steps, sum(rows for *_, rows in found), len(found), len(good), len(drawn) - len(found))


def read_errors(storage: Storage, units: Sequence[Unit]) -> Errors:
    """Return the kinds of errors in the parts that have error rows, or in a sample of these parts."""
    failed = [unit for unit in units if unit.totals.errors]
    drawn = _draw(failed)
    found = _each(lambda unit: _read_kinds(storage, unit), drawn)
    kinds = ErrorKinds()
    for of_part in found:
        kinds.merge(of_part)
    return Errors(kinds.counts(), len(found), len(failed))


def _draw(units: Sequence[Unit]) -> list[Unit]:
    """Return a random sample of the units, within the limits PARTS_READ and ROWS_READ."""
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
    """Return the results of `read` for the units, without the units whose part cannot be read."""

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
    """Return (values by measure, number of blocks by steps, number of rows) of one row group, without error rows."""
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
    """Return the kinds of errors in one part."""
    kinds, columns = ErrorKinds(), ["error", "source_row"]
    with _open(storage, unit) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            bad = batch.filter(pc.is_valid(batch["error"]))
            for text, row in zip(bad["error"].to_pylist(), bad["source_row"].to_pylist(), strict=True):
                kinds.add(f"{unit.file}#{row}", str(text))
    return kinds.counts()
