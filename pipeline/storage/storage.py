"""Storage: the operations that the pipeline needs of local files and of any fsspec URL. No other folder opens paths.

Transient failures are tried again (pipeline.storage.retrying); what is left becomes one line that names the operation,
the path, the cause and what to do. What is read is whole: fewer bytes than there are, or were asked for, are a failure,
too. Credentials in a URL never reach a text.
"""

import errno
import fnmatch
import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import StorageError
from pipeline.storage import retrying
from pipeline.storage.local import DANGLING, LocalFiles, create_local, write_local
from pipeline.storage.retrying import call_with_retries
from pipeline.storage.urls import cause, is_local, safe_url

T = TypeVar("T")
CONNECT_S, SILENCE_S = 5.0, 20.0
"""Until a server takes a connection, and between two signs of life of an answer."""
ANSWER_S, SLOWEST_BYTES_S = 60.0, 100_000
"""A try may take so many seconds, and one more for every so many bytes: an answer that drips is cut off."""
LISTING_BYTES = 100_000_000
"""What the answers of the longest listing come to."""
S3_FILE_BYTES = 5 << 30
"""What S3 takes in one request. Uploads in several requests would stay behind, unseen and paid for, where one ends."""
_S3_OPTIONS = {
    "config_kwargs": {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_S,
        "read_timeout": SILENCE_S,
        "max_pool_connections": 32,
    },
    "max_concurrency": 1,  # else a whole file is read in pieces whose lengths nobody checks
}
HASH_CHUNK_BYTES = 1 << 20
_BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A stored file as a listing shows it."""

    name: str
    """Relative to the listed root, with forward slashes."""
    path: str
    """Path or URL that opens it."""
    size: int
    """Bytes; DANGLING: a link that leads to nothing."""
    stamp: str
    """Changes when the content does: `etag:…`, `mtime:…` or `sha256:…`."""


class Storage:
    """A folder, local or behind a URL. Names are relative to it, with forward slashes; "" is the folder itself.

    Methods raise StorageError when an operation fails for good. One object may be used from many threads.
    """

    def __init__(self, root: str) -> None:
        """Raises StorageError where the URL cannot be used: an unknown protocol, a library or an archive missing."""
        if "\0" in root:
            raise StorageError("cannot use {}: it holds a NUL byte".format(safe_url(root).replace("\0", "\\0")))
        self.root = root.rstrip("/") or "/"
        try:
            if is_local(root):
                self._fs, path = LocalFiles(), str(LocalFileSystem._strip_protocol(root))
            else:
                # No cache of listings: another process may have published since.
                s3 = root.startswith(("s3://", "s3a://"))
                self._fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False, **(_S3_OPTIONS if s3 else {}))
                if s3:
                    self._fs.retries = 1
        except Exception as error:  # whatever the protocol's library raises, it is about this URL
            raise StorageError(f"cannot use {safe_url(root)}: {cause(error)}") from error
        self._path = path.rstrip("/") or "/"
        self._local = isinstance(self._fs, LocalFileSystem)
        if self._local:
            self._fs = LocalFiles()
        elif not self._path.strip("/") and root.partition("://")[0] in _BUCKET_PROTOCOLS:
            raise StorageError(f"cannot use {root}: it names no bucket; write {root.rstrip(':/')}://bucket/…")

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        return self._call("look for", name, self._info) is not None

    def kind(self) -> str | None:
        """What the root itself is: "file", "folder", "other" (a pipe, a device) or None where there is nothing."""
        info = self._call("look for", "", self._info)
        return None if info is None else {"file": "file", "directory": "folder"}.get(info["type"], "other")

    def stat(self, name: str) -> FileInfo | None:
        """Size and stamp of one file; None where there is none."""
        info = self._call("look at", name, self._info)
        return None if info is None or info["type"] != "file" else self._file_info(info)

    def list_files(self, folder: str, pattern: str) -> list[FileInfo]:
        """Files directly in a folder whose last name part matches the pattern, sorted; none if there is no folder."""
        found = self._call("list", folder, partial(self._listing, self._fs.ls))
        files = [info for info in found if info.size != DANGLING]
        return [info for info in files if fnmatch.fnmatchcase(info.name.rpartition("/")[2], pattern)]

    def find(self) -> list[FileInfo]:
        """All files below the root, and links to nothing, sorted by name; none if there is no folder."""
        return self._call("list", "", partial(self._listing, self._fs.find))

    def glob(self, pattern: str) -> list[FileInfo]:
        """The same for the names that match the pattern (`*`, `?`, `[…]`, `**`), relative to the root."""
        return self._call("list", pattern, partial(self._listing, self._fs.glob))

    def read(self, name: str) -> bytes:
        """The whole content."""
        return self._call("read", name, self._read_whole)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes from start up to, not including, end: all of them, or StorageError."""
        return self._call("read", name, partial(self._read_range, start=start, end=end))

    def read_if_exists(self, name: str) -> bytes | None:
        """The whole content, or None where there is no such file."""

        def fetch(path: str) -> bytes | None:
            with suppress(FileNotFoundError, NotADirectoryError):
                return self._read_whole(path)
            return None

        return self._call("read", name, fetch)

    def sha256(self, name: str, size: int) -> str:
        """Checksum (hex) of a file of `size` bytes, read in pieces."""
        digest = hashlib.sha256()
        for start in range(0, size, HASH_CHUNK_BYTES):
            digest.update(self.read_range(name, start, min(size, start + HASH_CHUNK_BYTES)))
        return digest.hexdigest()

    def open(self, name: str, size: int) -> pa.NativeFile:
        """A seekable file of `size` bytes for pyarrow: reads ranges as asked and caches nothing."""
        if self._local:
            return self._call("open", name, lambda path: pa.OSFile(path, "rb"))
        return pa.PythonFile(_RangeFile(self, name, size), mode="r")

    def write(self, name: str, data: bytes) -> None:
        """Writes the whole file, replacing what was there; readers see the old or the new one, never a part."""
        if self._local:
            self._call("write", name, lambda path: write_local(path, data, os.replace))
        else:
            self._call("write", name, lambda path: self._upload(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Writes the whole file if there is none; the first writer wins. False: there is one already.

        After a lost acknowledgement the retry finds the file that this very call wrote and answers False:
        who must know reads back a writer id from inside the file.
        """
        if self._local:
            return self._call("create", name, lambda path: create_local(path, data))
        return self._call("create", name, lambda path: self._create_remote(path, data))

    def remove(self, name: str) -> None:
        """Deletes the file if it is there."""

        def delete(path: str) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(path, **self._limit(0))

        self._call("delete", name, delete)

    def _read_whole(self, path: str) -> bytes:
        expected = self._fs.info(path, **self._limit(0))["size"]
        data = bytes(self._fs.cat_file(path, **self._limit(expected or 0)))
        if expected is not None and len(data) != expected:
            raise OSError(errno.EIO, f"{len(data)} of its {expected} bytes came")
        return data

    def _read_range(self, path: str, start: int, end: int) -> bytes:
        data = bytes(self._fs.cat_file(path, start=start, end=end, **self._limit(end - start)))
        if len(data) == end - start:
            return data
        size = self._fs.info(path, **self._limit(0))["size"]
        if size is not None and size < end:
            raise OSError(errno.EINVAL, f"it has {size} bytes, and bytes up to {end} were asked for: it was replaced")
        raise OSError(errno.EIO, f"{len(data)} of {end - start} bytes came")

    def _upload(self, path: str, data: bytes, **options: Any) -> None:
        if "s3" in self._fs.protocol:
            if len(data) >= S3_FILE_BYTES:
                raise OSError(errno.EINVAL, f"{len(data)} bytes are too many for one S3 request; make smaller files")
            options["chunksize"] = S3_FILE_BYTES  # below it, s3fs sends a file in one request
        self._fs.pipe_file(path, data, **options, **self._limit(len(data)))

    def _create_remote(self, path: str, data: bytes) -> bool:
        try:
            self._upload(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Servers that answer a failed precondition without naming the condition come through as EINVAL.
            if error.errno == errno.EINVAL and self._info(path) is not None:
                return False
            raise
        return True

    def _limit(self, size: int) -> dict[str, float]:
        """The argument that ends a try which moves `size` bytes and takes too long: async file systems know it."""
        return {"timeout": ANSWER_S + size / SLOWEST_BYTES_S} if self._fs.async_impl else {}

    def _info(self, path: str) -> dict[str, Any] | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return dict(self._fs.info(path, **self._limit(0)))
        return None

    def _listing(self, lister: Callable[..., Any], path: str) -> list[FileInfo]:
        try:
            found = lister(path, detail=True, **self._limit(LISTING_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return []
        infos = found.values() if isinstance(found, dict) else found
        # An object store may list a folder as an empty object of its own name.
        kinds = ("file", "dangling")
        files = [info for info in infos if info["type"] in kinds and not str(info["name"]).endswith("/")]
        return sorted(map(self._file_info, files), key=lambda info: info.name)

    def _file_info(self, info: dict[str, Any]) -> FileInfo:
        path = str(info["name"])
        shown = path if self._local else str(self._fs.unstrip_protocol(path))
        return FileInfo(path.removeprefix(self._path).lstrip("/"), shown, int(info["size"]), _stamp(info, self._local))

    def _call(self, operation: str, name: str, function: Callable[[str], T]) -> T:
        path = f"{self._path.rstrip('/')}/{name}" if name else self._path
        url = safe_url(f"{self.root.rstrip('/')}/{name}" if name else self.root)
        result = call_with_retries(f"cannot {operation} {url}", self._patience_s(), partial(function, path))
        self._fs.twotower_answered = True  # file systems are shared by all Storages of a store
        return result

    def _patience_s(self) -> float:
        if self._local:
            return retrying.LOCAL_PATIENCE_S
        known = hasattr(self._fs, "twotower_answered")
        return retrying.PATIENCE_S if known else min(retrying.STRANGER_PATIENCE_S, retrying.PATIENCE_S)


class _RangeFile(io.RawIOBase):
    """A remote object as a seekable file: every read is one range request with the storage's retries."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        super().__init__()
        self._storage, self._name, self._size, self._position = storage, name, size, 0

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
        data = self._storage.read_range(self._name, self._position, end)
        self._position += len(data)
        return data


def split_url(url: str) -> tuple[Storage, str]:
    """The folder of a file's path or URL, and its name there. Raises StorageError."""
    folder, _, name = url.rpartition("/")
    return Storage(folder or "/"), name


def real_path(url: str) -> str:
    """The local path with its links resolved and without file://; any other URL as it is. Raises StorageError."""
    storage = Storage(url)
    return os.path.realpath(storage._path) if storage._local else url


def read_text(path: str, at_most: int = -1) -> str:
    """A local text file, whole or its first `at_most` characters.

    Raises OSError and UnicodeDecodeError as they are: the caller knows what it wanted.
    """
    with open(path, encoding="utf-8") as file:
        return file.read(at_most)


def _stamp(info: dict[str, Any], local: bool) -> str:
    if not local:
        for key in ("ETag", "etag", "md5Hash"):
            if info.get(key):
                return "etag:" + str(info[key]).strip('"')
    changed = (info[key] for key in ("mtime", "LastModified", "last_modified", "created") if info.get(key))
    return f"mtime:{next(changed, '')}"
