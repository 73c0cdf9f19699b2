"""Creates temporary files on the local disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Scratch:
    """A set of numbered temporary local files. Data is appended to them, and then they are read as a whole."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def append(self, number: int, data: bytes) -> None:
        """Append to the file of that number, which is created at the first call."""
        with open(os.path.join(self._folder, str(number)), "ab") as file:
            file.write(data)

    def read(self, number: int) -> bytes:
        """Return all data of the file of that number, or empty bytes if there is none."""
        with suppress(FileNotFoundError), open(os.path.join(self._folder, str(number)), "rb") as file:
            return file.read()
        return b""


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Open a set of temporary files on the local disk that are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="twotower-") as folder:
        yield Scratch(folder)
