"""Keeps data that may be too much for memory in temporary files on the local disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Scratch:
    """A folder of temporary files that are known by number. Data is appended to a file, and later read as a whole."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def append(self, number: int, data: bytes) -> None:
        """Append the data to the file of that number. The first call for a number creates its file."""
        with open(os.path.join(self._folder, str(number)), "ab") as file:
            file.write(data)

    def read(self, number: int) -> bytes:
        """Return all data of the file of that number; empty bytes if nothing was appended to it."""
        with suppress(FileNotFoundError), open(os.path.join(self._folder, str(number)), "rb") as file:
            return file.read()
        return b""


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Open an empty set of temporary files. They are deleted at the end of the `with` block."""
    with tempfile.TemporaryDirectory(prefix="twotower-") as folder:
        yield Scratch(folder)
