"""Lists local files and follows links in doing so; writes a local file either as a whole or not at all."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem

DANGLING = -1
"""The size that a listing gives for a link whose target does not exist."""

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


def write_local(path: str, data: bytes, publish: Callable[[str, str], object]) -> None:
    """Write the data to a hidden file in the same folder, then call `publish(hidden, path)` to give it its name.

    A crash therefore leaves no half file at `path`. The folder is created if it is missing, the data is synced to the
    disk, and the hidden name is removed in the end. Errors of the system and of `publish` are raised unchanged.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
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


def create_local(path: str, data: bytes) -> bool:
    """Write the file unless it exists, and return whether this call wrote it.

    On a file system without hard links, the file exists empty for a moment before it has its content.
    """
    try:
        write_local(path, data, _link)
    except FileExistsError:
        return False
    return True


def _link(hidden: str, path: str) -> None:
    try:
        os.link(hidden, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # The file system has no hard links: take the name with an empty file, then replace that by the content.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(hidden, path)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
