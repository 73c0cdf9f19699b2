"""Opens a file behind a URL for pyarrow, which reads ranges of it."""

import io
from collections.abc import Callable


class RangeFile(io.RawIOBase):
    """A file behind a URL as a seekable Python file. Every read is one range request, which `read_range` retries."""

    def __init__(self, read_range: Callable[[str, int, int], bytes], name: str, size: int) -> None:
        """Take Storage.read_range, the name of the file there, and its size in bytes."""
        super().__init__()
        self._read_range, self._name, self._size, self._position = read_range, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._position + size)
        if end <= self._position:
            return b""
        data = self._read_range(self._name, self._position, end)
        self._position += len(data)
        return data
