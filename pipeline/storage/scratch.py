"""Temporary files on the local disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Scratch:
    """Numbered temporary local files that are appended to and then read whole."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def append(self, number: int, data: bytes) -> None:
        """Adds to the file of that number, making it at first."""
        with open(os.path.join(self._folder, str(number)), "ab") as file:
            file.write(data)

    def read(self, number: int) -> bytes:
        """All that was appended to the file of that number."""
        with suppress(FileNotFoundError), open(os.path.join(self._folder, str(number)), "rb") as file:
            return file.read()
        return b""


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Temporary files on the local disk, deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="twotower-") as folder:
        yield Scratch(folder)
