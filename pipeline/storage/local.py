"""Lists local files and follows links in doing so; writes a local file either as a whole or not at all."""

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem

DANGLING = -1
"""The size that a listing gives for a link whose target does not exist."""

EMPTY_S = 1.0
"""Seconds for which a file must stay empty until it counts as left behind by a writer that was killed.

A writer that lives fills it in some milliseconds. It is also the time after which writers that filled the same empty
file look whose content stands.
"""
_NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalFiles(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A local file system whose listings also follow links to files and folders.

    A link to a folder that contains the link is left out; otherwise the listing would never end. A folder that cannot
    be read is an error, not an empty folder; otherwise its rows would be missing unnoticed.
    """

    def info(self, path: Any, **kwargs: Any) -> Any:
        """Return the entry of a file for a listing; for a link that of its target, or one with size DANGLING."""
        if not isinstance(path, os.DirEntry) or not path.is_symlink():
            return super().info(path, **kwargs)
        try:
            return super().info(path.path, **kwargs)
        except OSError:
            return {"name": path.path, "size": DANGLING, "type": "dangling"}

    def walk(self, path: str, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any, Any]]:  # recursive in fsspec
        """Yield (folder, folders in it, files in it) for each folder from `path` downwards."""
        for folder, dirs, files in super().walk(path, *args, **{"on_error": "raise", **kwargs}):
            for name, info in list(dirs.items()) if isinstance(dirs, dict) else []:
                if info["islink"] and os.path.realpath(info["name"]) in _real_ancestors(folder):
                    del dirs[name]
            yield folder, dirs, files


def _real_ancestors(folder: str) -> set[str]:
    parts = folder.split("/")
    return {os.path.realpath("/".join(parts[:depth]) or "/") for depth in range(1, len(parts) + 1)}


def write_local(path: str, data: bytes, publish: Callable[[str, str], object], anchor: str | None = None) -> None:
    """Write the data to a hidden file in the same folder, then call `publish(hidden, path)` to give it its name.

    A crash therefore leaves no half file at `path`. The folder is created if it is missing, the data is synced to the
    disk, and the hidden name is removed in the end. Errors of the system and of `publish` are raised unchanged.
    `anchor`: a folder that must exist; only folders below it are created then.
    """
    folder, name = os.path.split(path)
    _make_folders(folder, anchor)
    hidden = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(hidden, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(hidden, path)
        _sync_folder(folder)
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(hidden)


def _make_folders(folder: str, anchor: str | None) -> None:
    """Create the folder and missing folders above it; with `anchor` only those below this one, which must exist."""
    if anchor is None:
        os.makedirs(folder, exist_ok=True)
        return
    if not os.path.isdir(anchor):
        # It is tried again as after an outage, because the folder may only be unmounted for a moment.
        raise OSError(errno.ESTALE, f"{anchor} was removed or moved")
    if folder.startswith(f"{anchor}/"):
        for name in folder.removeprefix(f"{anchor}/").split("/"):
            anchor = f"{anchor}/{name}"
            with suppress(FileExistsError):
                os.mkdir(anchor)  # fails if the folder above it has gone by now


def create_local(path: str, data: bytes, anchor: str | None = None) -> bool:
    """Write the file unless it exists, and return whether this call wrote it. `anchor`: see write_local.

    A file of 0 bytes is taken for absent unless `data` is empty, if it stays so for EMPTY_S: on a file system without
    hard links, a writer takes the name with an empty file, and it may have been killed before it filled the file.
    """
    filled = False

    def publish(hidden: str, path: str) -> None:
        nonlocal filled
        filled = _link(hidden, path, may_fill=bool(data))

    try:
        write_local(path, data, publish, anchor)
    except FileExistsError:
        return False
    return not filled or _content(path) == data


def _link(hidden: str, path: str, *, may_fill: bool) -> bool:
    """Give the hidden file its name unless that is taken; then FileExistsError is raised.

    Returns False if it is certain that no other writer gave the same name to another file. Otherwise two writers may
    have filled the same empty file, and the one whose content is there now has won. `may_fill`: an empty file that has
    the name already may be filled.
    """
    began = time.monotonic()
    try:
        os.link(hidden, path)
    except FileExistsError:
        if not may_fill or not _stays_empty(path):
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if not may_fill or not _stays_empty(path):
                raise
    else:
        return False
    # Others that see the empty file wait for EMPTY_S before they fill it, so nobody else has done so yet. If this
    # process was stopped for so long, somebody may have.
    if _size(path) != 0:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.replace(hidden, path)
    if time.monotonic() - began >= EMPTY_S / 2:
        time.sleep(EMPTY_S)  # another writer that saw the empty file replaces this one's file by then
    return True


def _stays_empty(path: str) -> bool:
    """Return whether the file has 0 bytes and keeps them for EMPTY_S seconds."""
    deadline = time.monotonic() + EMPTY_S
    while _size(path) == 0:
        left = deadline - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, 0.05))
    return False


def _size(path: str) -> int | None:
    """Return the number of bytes of a file; None if there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
