"""Lists local files, following links, and writes a local file either as a whole or not at all."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem

DANGLING = -1

_NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalFiles(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A local file system that also follows links to files and folders in listings.

    It leaves out a link that leads to a folder which contains the link. A folder that cannot be read is an error, not
    an empty folder, because otherwise its rows would be missing unnoticed.
    """

    def info(self, path: Any, **kwargs: Any) -> Any:
        if not isinstance(path, os.DirEntry) or not path.is_symlink():
            return super().info(path, **kwargs)
        try:
            return super().info(path.path, **kwargs)
        except OSError:
            return {"name": path.path, "size": DANGLING, "type": "dangling"}

    def walk(self, path: str, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any, Any]]:  # recursive in fsspec
        for folder, dirs, files in super().walk(path, *args, **{"on_error": "raise", **kwargs}):
            for name, info in list(dirs.items()) if isinstance(dirs, dict) else []:
                if info["islink"] and os.path.realpath(info["name"]) in _real_ancestors(folder):
                    del dirs[name]
            yield folder, dirs, files


def _real_ancestors(folder: str) -> set[str]:
    parts = folder.split("/")
    return {os.path.realpath("/".join(parts[:depth]) or "/") for depth in range(1, len(parts) + 1)}


def write_local(path: str, data: bytes, publish: Callable[[str, str], object]) -> None:
    """Write a hidden file beside the path, then call `publish(hidden, path)`, so that a crash leaves no half file."""
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
        # The file system has no hard links: claim the name first, then replace the empty file by the content.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(hidden, path)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
