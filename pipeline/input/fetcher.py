"""Fetches the small files of work units in parallel, ahead of their decoding.

A request to an object store takes tens of milliseconds, so a thousand small files that are opened one after the other
would keep the engine waiting. Their bytes are held only until they are decoded, which one thread does in order.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.core.types import Piece, WorkUnit
from pipeline.input.planned_file import fetch_whole
from pipeline.storage.storage import Storage, split_path

THREADS = 32
"""The number of files that are fetched at the same time: as many as the storage keeps connections."""
WHOLE_BYTES, WHOLE_ALONE_BYTES = 8 << 20, 64 << 10
"""The largest file that is fetched whole if its unit has other files, and if the unit is of this file alone. Larger
files are read as they are decoded. A file with a unit of its own may have rows of other units, for which it would be
fetched again, so only a very small one is fetched whole."""
AHEAD_FILES, AHEAD_BYTES = 64, 64 << 20
"""The most files of a unit, and the most bytes of all units, that are fetched and not yet decoded. The next file of a
unit that is being decoded is fetched even if it is above the limit of the bytes."""


class Fetcher:
    """The threads that fetch files, and the memory that they may use. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._bytes = 0

    def fetch(self, unit: WorkUnit) -> "Fetch":
        """Begin to fetch the files of the unit. The result must be iterated over or closed."""
        return Fetch(unit, self._threads, self)

    def close(self) -> None:
        """End the threads without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def take(self, size: int, *, force: bool) -> bool:
        """Return whether there is room for a file of `size` bytes, and count it if there is or with `force`."""
        with self._lock:
            if not force and self._bytes + size > AHEAD_BYTES:
                return False
            self._bytes += size
            return True

    def give_back(self, size: int) -> None:
        """Count a file no more: it is about to be decoded, or nobody wants it."""
        with self._lock:
            self._bytes -= size


class Fetch:
    """The pieces of a unit with the bytes of their files, in order. It can be iterated over once."""

    def __init__(self, unit: WorkUnit, threads: ThreadPoolExecutor, memory: Fetcher) -> None:
        self._threads, self._memory = threads, memory
        self._folders: dict[str, Storage] = {}
        self._left = deque(unit.pieces)
        self._whole_bytes = WHOLE_BYTES if len(unit.pieces) > 1 else WHOLE_ALONE_BYTES
        self._ahead: deque[tuple[Piece, Future[bytes] | None]] = deque()
        self._begin_more()

    def __iter__(self) -> Iterator[tuple[Piece, bytes | None]]:
        """Yield (piece, bytes of its whole file, or None if it is to be read from the storage) for each piece.

        Raises InputError and StorageError as fetch_whole does; files that nobody is fetching yet are then left out.
        """
        try:
            while self._ahead or self._left:
                if not self._ahead:
                    self._begin_more(force=True)
                piece, future = self._ahead.popleft()
                data = None
                if future is not None:
                    try:
                        data = future.result()
                    finally:
                        self._memory.give_back(piece.size)
                del future  # it holds the bytes too
                self._begin_more()
                yield piece, data
        finally:
            self.close()

    def close(self) -> None:
        """Drop what is fetched and begin nothing more."""
        self._left.clear()
        while self._ahead:
            piece, future = self._ahead.popleft()
            if future is not None:
                future.cancel()
                self._memory.give_back(piece.size)

    def _begin_more(self, *, force: bool = False) -> None:
        """Begin to fetch files as far as the limits allow; with `force`, at least one."""
        while self._left and len(self._ahead) < AHEAD_FILES:
            piece = self._left[0]
            whole = 0 <= piece.size <= self._whole_bytes
            if whole and not self._memory.take(piece.size, force=force):
                return
            force = False
            self._left.popleft()
            self._ahead.append((piece, self._threads.submit(self._fetch, piece) if whole else None))

    def _fetch(self, piece: Piece) -> bytes:
        """Return the bytes of a file. To open its folder takes time, so that is done once for all files in it."""
        folder, _ = split_path(piece.file)
        storage = self._folders.get(folder) or self._folders.setdefault(folder, Storage(folder))
        return fetch_whole(piece, storage)
