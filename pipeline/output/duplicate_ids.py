"""Finds ids that occur more than once in the output, at the end of a job and in bounded memory.

Ids are hashed to 64 bits and spread by ranges of the hash over files on the local disk (the buckets), each small enough
to sort in memory. Different text ids may share a hash and then count as duplicates: among 100 million, the chance that
any two do is below 0.1 %. Different integer ids never share a hash.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import OutputError
from pipeline.core.text import one_line
from pipeline.storage.scratch import Scratch, scratch
from pipeline.storage.storage import FileInfo, Storage
from pipeline.storage.urls import safe_url

IDS_A_BUCKET = 2_000_000
"""The number of ids per bucket that the number of buckets is chosen for."""
EXAMPLES = 10
"""The largest number of repeated ids that are given as examples."""
BATCH_ROWS = 65_536
"""The number of rows of a part whose ids are read at once."""
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it maps 64-bit integers one to one

Hashes = npt.NDArray[np.uint64]
"""The 64-bit hashes of ids, one per id (hash_ids)."""


class IdCounter:
    """Counts the ids that repeat an earlier one, by means of temporary files.

    `add` may be called from several threads. `count` is called once, after the last `add`.
    """

    def __init__(self, files: Scratch, rows: int) -> None:
        """Keep the buckets in `files`. `rows`: about how many ids will be added, for the number of buckets."""
        self._files = files
        self._buckets = max(1, -(-rows // IDS_A_BUCKET))
        self._lock = threading.Lock()

    def add(self, hashes: Hashes) -> None:
        """Add ids, given as their hashes (hash_ids)."""
        for bucket, members in _spread(hashes, self._buckets):
            with self._lock:
                self._files.append(bucket, members.tobytes())

    def count(self) -> tuple[int, Hashes]:
        """Return (number of added ids that repeat an earlier one, hashes of up to EXAMPLES different ids that repeat).

        An id that was added three times counts as two repetitions.
        """
        duplicates = 0
        repeated: list[np.uint64] = []
        for bucket in range(self._buckets):
            values, counts = np.unique(np.frombuffer(self._files.read(bucket), np.uint64), return_counts=True)
            duplicates += int((counts - 1).sum())
            if len(repeated) < EXAMPLES:
                repeated += list(values[counts > 1][:EXAMPLES])
        return duplicates, np.array(repeated[:EXAMPLES], np.uint64)


def find_duplicates(storage: Storage, parts: Sequence[FileInfo], rows: int) -> tuple[int, tuple[str, ...]]:
    """Return (number of rows whose id an earlier row has, up to EXAMPLES such ids as text) for the rows of these parts.

    Null ids do not count. `rows`: about how many rows the parts have, for the number of buckets. Raises StorageError if
    the storage fails, OutputError if a part's data is damaged.
    """
    with scratch() as files:
        counter = IdCounter(files, rows)
        for ids in _read_ids(storage, parts):
            counter.add(hash_ids(ids))
        duplicates, repeated = counter.count()
    return duplicates, _examples(storage, parts, repeated) if duplicates else ()


def _examples(storage: Storage, parts: Sequence[FileInfo], wanted: Hashes) -> tuple[str, ...]:
    """Return up to EXAMPLES ids with these hashes, as text. Reads the parts only until enough ids are found."""
    found: dict[str, None] = {}
    for ids in _read_ids(storage, parts):
        for index in np.flatnonzero(np.isin(hash_ids(ids), wanted)):
            found[str(ids[int(index)].as_py())] = None
        if len(found) >= len(wanted):
            break
    return tuple(found)[:EXAMPLES]


def _read_ids(storage: Storage, parts: Sequence[FileInfo]) -> "Iterator[pa.Array[Any]]":
    """Yield the ids of the parts in arrays of up to BATCH_ROWS, without null ids."""
    for part in parts:
        try:
            with storage.open(part.name, part.size) as source:
                for batch in pq.ParquetFile(source, page_checksum_verification=True).iter_batches(
                    BATCH_ROWS, columns=["id"], use_threads=False
                ):
                    yield batch.column(0).drop_null()
        except (pa.ArrowException, OSError) as error:
            raise OutputError(
                f"output {safe_url(storage.root)}: {part.name} is broken: {one_line(error)}; "
                "move it away and submit the job again, which generates its rows again"
            ) from error


def hash_ids(ids: "pa.Array[Any]") -> Hashes:
    """Return a 64-bit hash of each id, integer or text. It is the same only within this process. No id may be null."""
    if pa.types.is_integer(ids.type):
        unsigned = pa.types.is_uint64(ids.type)
        return ids.cast(pa.uint64() if unsigned else pa.int64()).to_numpy().view(np.uint64) * _MIX
    # The key of Python's own hash of text differs from process to process. All ids are hashed in one process here.
    return np.fromiter((hash(text) for text in ids.to_pylist()), np.int64, len(ids)).view(np.uint64)


def _spread(hashes: Hashes, buckets: int) -> Iterator[tuple[int, Hashes]]:
    """Yield (number of a bucket, the hashes that belong into it) for each bucket that gets any of them."""
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
