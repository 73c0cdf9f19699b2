"""Finds ids that occur more than once in the output, at the end of a job and in bounded memory.

Ids are hashed to 64 bits and spread by hash range over files on the local disk, each small enough to sort in memory.
Among 100 million text ids the chance that two different ids share a hash is below 0.1 %; integer ids never do.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import OutputError
from pipeline.storage.scratch import Scratch, scratch
from pipeline.storage.storage import FileInfo, Storage
from pipeline.storage.urls import safe_url

IDS_A_BUCKET = 2_000_000
EXAMPLES = 10
BATCH_ROWS = 65_536
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it maps 64-bit integers one to one

Hashes = npt.NDArray[np.uint64]


class IdCounter:
    """A counter of ids that occur more than once. `add` may be called from many threads."""

    def __init__(self, files: Scratch, rows: int) -> None:
        """Set up the buckets. `rows`: about how many ids will come, which decides the number of buckets."""
        self._files = files
        self._buckets = max(1, -(-rows // IDS_A_BUCKET))
        self._lock = threading.Lock()

    def add(self, hashes: Hashes) -> None:
        """Add these ids, hashed by hash_ids."""
        for bucket, members in _spread(hashes, self._buckets):
            with self._lock:
                self._files.append(bucket, members.tobytes())

    def count(self) -> tuple[int, Hashes]:
        """Return (number of ids that had occurred before, hashes of up to 10 of them)."""
        duplicates = 0
        repeated: list[np.uint64] = []
        for bucket in range(self._buckets):
            values, counts = np.unique(np.frombuffer(self._files.read(bucket), np.uint64), return_counts=True)
            duplicates += int((counts - 1).sum())
            if len(repeated) < EXAMPLES:
                repeated += list(values[counts > 1][:EXAMPLES])
        return duplicates, np.array(repeated[:EXAMPLES], np.uint64)


def find_duplicates(storage: Storage, parts: Sequence[FileInfo], rows: int) -> tuple[int, tuple[str, ...]]:
    """Return (number of rows whose id occurred before, up to 10 such ids as text) for the `id` column of the parts.

    Null ids do not count. `rows` sets the number of buckets. Raises StorageError if the storage fails, OutputError if a
    part's data is damaged.
    """
    with scratch() as files:
        counter = IdCounter(files, rows)
        for ids in _read_ids(storage, parts):
            counter.add(hash_ids(ids))
        duplicates, repeated = counter.count()
    return duplicates, _examples(storage, parts, repeated) if duplicates else ()


def _examples(storage: Storage, parts: Sequence[FileInfo], wanted: Hashes) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for ids in _read_ids(storage, parts):
        for index in np.flatnonzero(np.isin(hash_ids(ids), wanted)):
            found[str(ids[int(index)].as_py())] = None
        if len(found) >= len(wanted):
            break
    return tuple(found)[:EXAMPLES]


def _read_ids(storage: Storage, parts: Sequence[FileInfo]) -> "Iterator[pa.Array[Any]]":
    for part in parts:
        try:
            with storage.open(part.name, part.size) as source:
                for batch in pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=["id"], use_threads=False):
                    yield batch.column(0).drop_null()
        except (pa.ArrowException, OSError) as error:
            raise OutputError(
                f"output {safe_url(storage.root)}: {part.name} is broken: {' '.join(str(error).split())}; "
                "delete it to have its rows generated again"
            ) from error


def hash_ids(ids: "pa.Array[Any]") -> Hashes:
    """Return a 64-bit hash of each id. No id may be null."""
    if pa.types.is_integer(ids.type):
        unsigned = pa.types.is_uint64(ids.type)
        return ids.cast(pa.uint64() if unsigned else pa.int64()).to_numpy().view(np.uint64) * _MIX
    # Python's own hash of text has 64 bits and a key that changes with each process, which does no harm here.
    return np.fromiter((hash(text) for text in ids.to_pylist()), np.int64, len(ids)).view(np.uint64)


def _spread(hashes: Hashes, buckets: int) -> Iterator[tuple[int, Hashes]]:
    if buckets == 1:
        yield 0, hashes
        return
    number = ((hashes >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
    order = np.argsort(number, kind="stable")
    edges = np.searchsorted(number[order], np.arange(buckets + 1, dtype=np.uint64))
    for bucket in range(buckets):
        members = hashes[order[edges[bucket] : edges[bucket + 1]]]
        if len(members):
            yield bucket, members
