"""Reads, lists and writes files for the pipeline, local or behind any fsspec URL; no other folder opens paths.

Failures that may pass are retried (pipeline.storage.retrying). A failure that remains becomes a StorageError of one
line with the operation, the path, the cause and, if known, what to do. Data is always complete: fewer bytes than the
file has, or than were asked for, are a failure. No message contains credentials from a URL.
"""

import errno
import fnmatch
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NoReturn, TypeVar

import fsspec
import fsspec.asyn
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import StorageError
from pipeline.storage import local, retrying
from pipeline.storage.failures import cause, hidden_failure
from pipeline.storage.listing import list_whole_pages, watch_pages
from pipeline.storage.local import DANGLING, LocalFiles, create_local, write_local
from pipeline.storage.range_file import RangeFile
from pipeline.storage.retrying import call_store, call_with_retries
from pipeline.storage.s3 import get_object, look_for_credentials, with_reason
from pipeline.storage.urls import credentials_flaw, is_local, safe_url

T = TypeVar("T")
CONNECT_S, SILENCE_S = 5.0, 20.0
"""Seconds within which an S3 server must accept a connection, and seconds for which its answer may pause."""
ANSWER_S, SLOWEST_BYTES_S = 60.0, 100_000
"""A request may take ANSWER_S seconds, and one second more for every SLOWEST_BYTES_S bytes that it moves; then it
counts as failed. A very slow answer therefore ends."""
LISTING_BYTES = 100_000_000
"""The assumed size in bytes of the answers to the longest listing, from which the time limit of every listing
follows."""
S3_FILE_BYTES = 5 << 30
"""The most bytes that S3 takes in one request.

Every file is uploaded in one request, and a file of this size or more is refused, because an interrupted upload in
several requests would leave pieces on the server that nobody sees but that cost money.
"""
_S3_OPTIONS = {
    "config_kwargs": {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_S,
        "read_timeout": SILENCE_S,
        "max_pool_connections": 32,
    },
    "max_concurrency": 1,  # otherwise s3fs reads a file in pieces and does not check their lengths
}
HASH_CHUNK_BYTES = 1 << 20
"""The bytes that are read at once to compute a checksum."""
_WRITES = ("write", "create", "delete")
_BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The facts about a stored file without its content, as a listing or `Storage.stat` gives them."""

    name: str
    """The name relative to the root of the Storage, with forward slashes."""
    path: str
    """The path or URL that opens the file."""
    size: int
    """The size in bytes, or DANGLING for a link that leads to nothing."""
    stamp: str
    """A text that changes when the content does: `etag:…` if the store has one, else `mtime:…`; `sha256:…` for input in
    Ray's package (pipeline.input.files)."""


class Storage:
    """A folder, local or behind a URL, whose files are read, listed and written. It need not exist.

    The names that methods take are relative to the folder, with forward slashes; "" is the folder itself. Methods raise
    StorageError if an operation fails and retries could not help or did not help. Several threads may use one object.
    """

    def __init__(self, root: str, *, anchor: str | None = None, patience_s: float = inf) -> None:
        """Open the folder at a path or URL; nothing is created.

        `anchor`: a folder in it. On a local disk, files are then written only while this folder exists, so that a
        folder which somebody removes meanwhile is not created anew. `patience_s`: the most seconds for which an
        operation is retried, if that is less than usual.

        Raises StorageError if the URL cannot be used: its protocol is unknown, a library or an archive is missing, or
        it names no bucket or holds a NUL byte or credentials (see credentials_flaw).
        """
        if why := credentials_flaw(root):
            raise StorageError(f"cannot use {safe_url(root)}: {why}")
        if "\0" in root:
            raise StorageError("cannot use {}: it holds a NUL byte".format(safe_url(root).replace("\0", "\\0")))
        self.root = root.rstrip("/") or "/"
        try:
            if is_local(root):
                self._fs, path = LocalFiles(), str(LocalFileSystem._strip_protocol(root))
            else:
                # Listings are not cached, because another process may have written files in the meantime.
                s3 = root.startswith(("s3://", "s3a://"))
                self._fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False, **(_S3_OPTIONS if s3 else {}))
                if s3:
                    self._fs.retries = 1
                    watch_pages(self._fs)
        except Exception as error:  # any error that the protocol's library raises here is about this URL
            raise StorageError(f"cannot use {safe_url(root)}: {cause(error)}") from error
        self._path = path.rstrip("/") or "/"
        self._local = isinstance(self._fs, LocalFileSystem)
        self._anchor, self._longest_s = anchor and f"{self._path.rstrip('/')}/{anchor}", patience_s
        if self._local:
            self._fs = LocalFiles()
        elif not self._path.strip("/") and root.partition("://")[0] in _BUCKET_PROTOCOLS:
            raise StorageError(f"cannot use {root}: it names no bucket; write {root.rstrip(':/')}://bucket/…")

    def exists(self, name: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return self._call("look for", name, self._info) is not None

    def kind(self) -> str | None:
        """Return the kind of the root: "file", "folder" or "other" (a pipe, a device); None if there is nothing."""
        info = self._call("look for", "", self._info)
        return None if info is None else {"file": "file", "directory": "folder"}.get(info["type"], "other")

    def stat(self, name: str) -> FileInfo | None:
        """Return the facts about one file; None if there is none of that name, or if it is a folder."""
        info = self._call("look at", name, self._info)
        return None if info is None or info["type"] != "file" else self._file_info(info)

    def list_files(self, folder: str, pattern: str) -> list[FileInfo]:
        """Return the files directly in a folder, sorted by name, without links to nothing.

        `pattern` must match the file's name without its folder; it may contain `*`, `?` and `[…]`. Returns an empty
        list if there is no such folder.
        """
        found = self._call("list", folder, partial(self._listing, self._fs.ls))
        files = [info for info in found if info.size != DANGLING]
        return [info for info in files if fnmatch.fnmatchcase(info.name.rpartition("/")[2], pattern)]

    def find(self) -> list[FileInfo]:
        """Return all files below the root, and links to nothing, sorted by name; an empty list if there is no root."""
        return self._call("list", "", partial(self._listing, self._fs.find))

    def glob(self, pattern: str) -> list[FileInfo]:
        """Return the files, and links to nothing, whose names match the pattern, sorted by name.

        The pattern is relative to the root and may contain `*`, `?`, `[…]` and `**`.
        """
        return self._call("list", pattern, partial(self._listing, self._fs.glob))

    def read(self, name: str) -> bytes:
        """Return the whole content of the file."""
        return self._call("read", name, self._read_whole)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of the file from `start` up to `end`, which is excluded. Raises StorageError if the file has
        fewer."""
        return self._call("read", name, partial(self._read_range, start=start, end=end))

    def read_version(self, name: str, size: int) -> tuple[bytes, FileInfo | None]:
        """Return the first `size` bytes of the file, and the facts about the version of the file that they are from:
        on S3 from the same answer, elsewhere looked up afterwards (None if the file is gone by then).

        Raises StorageError if the file has fewer bytes.
        """
        if "s3" in self._fs.protocol and size > 0:
            return self._call("read", name, partial(self._read_s3_version, size=size))
        return self.read_range(name, 0, size), self.stat(name)

    def read_if_exists(self, name: str) -> bytes | None:
        """Return the whole content of the file, or None if there is no such file."""

        return self._call("read", name, lambda path: _unless_absent(lambda: self._read_whole(path)))

    def sha256(self, name: str, size: int) -> str:
        """Return the SHA-256 checksum (hex) of the first `size` bytes of the file, which is read in pieces."""
        digest = hashlib.sha256()
        for start in range(0, size, HASH_CHUNK_BYTES):
            digest.update(self.read_range(name, start, min(size, start + HASH_CHUNK_BYTES)))
        return digest.hexdigest()

    def open(self, name: str, size: int) -> pa.NativeFile:
        """Return a seekable file for pyarrow.

        Behind a URL, the file must have `size` bytes. Only the ranges that pyarrow asks for are read, and nothing is
        cached. A missing file is noticed by the first read.
        """
        if self._local:
            return self._call("open", name, lambda path: pa.OSFile(path, "rb"))
        return pa.PythonFile(RangeFile(self.read_range, name, size), mode="r")

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, in place of an existing one. Readers see the old or the new file, never half of one."""
        if self._local:
            self._call("write", name, lambda path: write_local(path, data, os.replace, self._anchor))
        else:
            self._call("write", name, lambda path: self._upload(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole file unless it exists, and return whether this call wrote it: the first writer wins.

        A file of 0 bytes counts as absent unless `data` is empty: it was left behind by a writer that was killed.
        If the store's answer to a successful write is lost, the retry finds the file that this same call wrote and
        returns False. A caller that must know puts a writer id into the file and reads it back.
        """
        if self._local:
            return self._call("create", name, lambda path: create_local(path, data, self._anchor))
        return self._call("create", name, lambda path: self._create_remote(path, data))

    def remove(self, name: str) -> None:
        """Delete the file if it exists."""

        self._call("delete", name, lambda path: _unless_absent(lambda: self._fs.rm_file(path, **self._limit(0))))

    def _read_whole(self, path: str) -> bytes:
        expected = self._fs.info(path, **self._limit(0))["size"]
        data = bytes(self._fs.cat_file(path, **self._limit(expected or 0)))
        if expected is not None and len(data) != expected:
            raise OSError(errno.EIO, f"{len(data)} of its {expected} bytes came")
        return data

    def _read_range(self, path: str, start: int, end: int) -> bytes:
        data = bytes(self._fs.cat_file(path, start=start, end=end, **self._limit(end - start)))
        if len(data) != end - start:
            _raise_short(len(data), start, end, self._fs.info(path, **self._limit(0))["size"])
        return data

    def _read_s3_version(self, path: str, size: int) -> tuple[bytes, FileInfo]:
        data, info = fsspec.asyn.sync(self._fs.loop, get_object, self._fs, path, size, **self._limit(size))
        if len(data) != size:
            _raise_short(len(data), 0, size, info["size"])
        return data, self._file_info(info)

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
            return self._fill_empty(path, data)
        except OSError as error:
            # s3fs raises EINVAL if the server does not say which precondition failed.
            if error.errno == errno.EINVAL and self._info(path) is not None:
                return self._fill_empty(path, data)
            raise
        return True

    def _fill_empty(self, path: str, data: bytes) -> bool:
        """Write the file if what has its name is of 0 bytes, and return whether this call's content is there then."""
        info = self._info(path) if data else None
        if info is None or info["type"] != "file" or info["size"] != 0:
            return False
        if "s3" in self._fs.protocol:  # of several writers, the store then lets only one replace the empty file
            try:
                self._upload(path, data, IfMatch=info["ETag"])
            except OSError as error:
                if not isinstance(error, FileExistsError) and error.errno != errno.EINVAL:
                    raise  # the others mean that another writer was first
        else:
            self._upload(path, data)
            time.sleep(local.EMPTY_S)  # another writer that saw the empty file has replaced this one's file by then
        return self._read_whole(path) == data

    def _limit(self, size: int) -> dict[str, float]:
        """Return the argument for fsspec that limits the time of one request that moves `size` bytes.

        It is empty for file systems that are not async, because they take no such argument.
        """
        return {"timeout": ANSWER_S + size / SLOWEST_BYTES_S} if self._fs.async_impl else {}

    def _info(self, path: str) -> dict[str, Any] | None:
        return _unless_absent(lambda: dict(self._fs.info(path, **self._limit(0))))

    def _listing(self, lister: Callable[..., Any], path: str) -> list[FileInfo]:
        def list_once() -> dict[str, FileInfo]:
            found = _unless_absent(lambda: lister(path, detail=True, **self._limit(LISTING_BYTES))) or []
            infos = found.values() if isinstance(found, dict) else found
            # An object store may list a folder as an empty object with the folder's name.
            kinds = ("file", "dangling")
            files = [info for info in infos if info["type"] in kinds and not str(info["name"]).endswith("/")]
            return {info.name: info for info in map(self._file_info, files)}

        found = list_whole_pages(self._fs, safe_url(self.root), list_once)
        return sorted(found.values(), key=lambda info: info.name)

    def _file_info(self, info: dict[str, Any]) -> FileInfo:
        path = str(info["name"])
        shown = path if self._local else str(self._fs.unstrip_protocol(path))
        return FileInfo(path.removeprefix(self._path).lstrip("/"), shown, int(info["size"]), _stamp(info, self._local))

    def _call(self, operation: str, name: str, function: Callable[[str], T]) -> T:
        path = f"{self._path.rstrip('/')}/{name}" if name else self._path
        url = safe_url(f"{self.root.rstrip('/')}/{name}" if name else self.root)
        what = f"cannot {operation} {url}"
        if self._local:
            return call_with_retries(what, min(retrying.LOCAL_PATIENCE_S, self._longest_s), partial(function, path))
        bucket = "/".join(self.root.split("/")[:3])
        call, writes = partial(self._call_remote, function, path), operation in _WRITES
        return call_store(what, bucket, call, writes=writes, longest_s=self._longest_s)

    def _call_remote(self, function: Callable[[str], T], path: str) -> T:
        """Call the function with a path of a store behind a URL. Its errors say what went wrong, as far as a library or
        the store can tell."""
        s3 = "s3" in self._fs.protocol
        try:
            return function(path)
        except FileNotFoundError as error:
            if hidden := hidden_failure(error):
                raise hidden from None
            raise
        except OSError as error:
            error = with_reason(self._fs, path, error, **self._limit(0)) if s3 else error
            if s3:
                look_for_credentials(self._fs, error)
            raise error from error.__cause__
        except RecursionError as error:
            if s3:  # its library follows redirects without an end if the store does not name the region
                raise OSError(errno.EREMCHG, "it is at another endpoint") from error
            raise


def _unless_absent(call: Callable[[], T]) -> T | None:
    """Return the result of `call`, or None if it says that the file or folder is missing."""
    try:
        return call()
    except (FileNotFoundError, NotADirectoryError) as error:
        if hidden := hidden_failure(error):
            raise hidden from None
        return None


def _raise_short(came: int, start: int, end: int, size: int | None) -> NoReturn:
    """Raise the error for a read of a range of which only `came` bytes came. `size`: the size of the file, if known."""
    if size is not None and size < end:
        raise OSError(errno.EINVAL, f"it has {size} bytes, and bytes up to {end} were asked for: it was replaced")
    raise OSError(errno.EIO, f"{came} of {end - start} bytes came")


def split_url(url: str) -> tuple[Storage, str]:
    """Return the folder of a file, given the file's path or URL, and the name of the file in it.

    Raises StorageError if the URL cannot be used.
    """
    folder, name = split_path(url)
    return Storage(folder), name


def split_path(url: str) -> tuple[str, str]:
    """Return the path or URL of a file's folder, and the name of the file in it."""
    folder, _, name = url.rpartition("/")
    return folder or "/", name


def real_path(url: str) -> str:
    """Return a local path as an absolute path without file:// and links; return the URL of another store unchanged.

    Raises StorageError if the URL cannot be used.
    """
    storage = Storage(url)
    return os.path.realpath(storage._path) if storage._local else url


def read_text(path: str, at_most: int = -1) -> str:
    """Return the text of a local file in UTF-8, or only its first `at_most` characters if that is not negative.

    Nothing is retried. Raises OSError and UnicodeDecodeError unchanged, because the caller knows what the file is for.
    """
    with open(path, encoding="utf-8") as file:
        return file.read(at_most)


def _stamp(info: dict[str, Any], is_local_file: bool) -> str:
    if not is_local_file:
        for key in ("ETag", "etag", "md5Hash"):
            if info.get(key):
                return "etag:" + str(info[key]).strip('"')
    changed = (info[key] for key in ("mtime", "LastModified", "last_modified", "created") if info.get(key))
    return f"mtime:{next(changed, '')}"
