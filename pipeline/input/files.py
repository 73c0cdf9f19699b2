"""Lists the files of an input path, which is a file, a folder or a glob, local or behind a URL."""

import re
from collections.abc import Callable
from dataclasses import replace

from fsspec.utils import glob_translate

from pipeline.core.errors import InputError
from pipeline.storage.listing import list_until_equal
from pipeline.storage.local import DANGLING
from pipeline.storage.storage import FileInfo, Storage, real_path
from pipeline.storage.urls import in_ray_package, is_inside, is_local, safe_url

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""The control characters: the Unicode category Cc."""


def list_input(path: str) -> tuple[str, list[FileInfo]]:
    """Return the root and the files of an input path: a file, a folder (all *.parquet below it) or a glob.

    File names are relative to the root, which is the folder, the folder of the file, or the part of a glob before its
    first wildcard. In a folder or glob, files and folders whose names begin with "_" or "." are left out. Raises
    InputError if nothing is found, or if the path, a name or a link cannot be used; StorageError if the listing fails.
    """
    # The name of a local file may contain brackets, but a URL that contains such characters is always a pattern.
    kind = None if _has_magic(path) and "://" in path else _kind(path)
    if kind == "other":
        raise InputError(f"input {safe_url(path)} is a pipe or a device: give a Parquet file, a folder or a glob")
    if kind == "folder":
        root, files = path, _list_folder(path)
    elif kind == "file" or not _has_magic(path):
        root, _, name = path.rstrip("/").rpartition("/")
        info = Storage(root or "/").stat(name)
        if info is None:
            raise InputError(f"input {safe_url(path)} does not exist: give a Parquet file, a folder or a glob")
        files = [info]
    else:
        root, files = _glob_root(path), _list_glob(path)
    for file in files:
        if file.size == DANGLING:
            raise InputError(
                f"input {safe_url(path)}: {_printable(file.name)} is a link that leads to nothing: fix it or remove it"
            )
        _check_name(file, path)
    return root or "/", [_with_lasting_stamp(root or "/", file) for file in files]


def would_read(path: str, root: str, output: str) -> bool:
    """Return whether the parts in an output folder would be read as input, because the input path covers the folder.

    `path`: the input path. `root`: its root, from list_input.
    """
    real_root, real_output = real_path(root), real_path(output)
    if _has_magic(path) and root != path:
        if not is_inside(real_output, real_root):
            return False
        part = f"{real_output}/part-000000000000-0000000000.parquet".removeprefix(real_root).lstrip("/")
        return re.match(glob_translate(_glob_pattern(path)), part) is not None
    return root == path and is_inside(real_output, real_root)


def _check_name(file: FileInfo, path: str) -> None:
    if not _is_utf8(file.path):
        wrong = "is a name that is not UTF-8: rename it"
    elif _CONTROL.search(file.name):
        wrong = "is a name with a control character: rename it"
    elif not {".", ".."}.isdisjoint(file.name.split("/")):
        wrong = "is a key with . or .. in it, which cannot be addressed: rename it"
    else:
        return
    raise InputError(f"input {_printable(safe_url(path))}: {_printable(file.name)} {wrong}")


def _list_folder(path: str) -> list[FileInfo]:
    found = [info for info in _list_surely(path, Storage(path).find) if _is_visible(info.name)]
    # A link whose target is gone is kept whatever its name is, because it may have led to a folder.
    files = [info for info in found if info.name.lower().endswith(".parquet") or info.size == DANGLING]
    if not files:
        has = ", ".join(_printable(info.name) for info in found[:3]) + (" …" if len(found) > 3 else "")
        text = f"; it has {has}" if has else ": it is empty"
        raise InputError(f"input {safe_url(path)} has no *.parquet file{text}")
    return files


def _kind(path: str) -> str | None:
    """Return the kind of the path as Storage.kind does. A store must say twice that there is nothing: an object store
    finds a folder by a listing."""
    storage = Storage(path)
    return storage.kind() or (None if is_local(path) else storage.kind())


def _list_surely(path: str, list_once: Callable[[], list[FileInfo]]) -> list[FileInfo]:
    """Return the listing of an input path, of a store behind a URL that of two listings which agree.

    The second listing costs little beside the footers, each of which takes a request of its own.
    """
    if is_local(path):
        return list_once()
    found = list_until_equal(f"input {safe_url(path)}", lambda: {info.name: info for info in list_once()})
    return sorted(found.values(), key=lambda info: info.name)


def _list_glob(path: str) -> list[FileInfo]:
    root = _glob_root(path)
    storage = Storage(root or "/")
    found = _list_surely(path, lambda: storage.glob(_glob_pattern(path)))
    files = [info for info in found if _is_visible(info.name)]
    if not files:
        storage.kind()  # fails if the store does not answer, which a listing of http does not say
        raise InputError(f"input {safe_url(path)} matches no file")
    return files


def _with_lasting_stamp(root: str, file: FileInfo) -> FileInfo:
    """Return the file with a checksum as its stamp if it is in Ray's copy of the working directory, else unchanged.

    Ray unpacks this copy with new file times on each machine. With a checksum, the job can resume on another machine.
    """
    if not in_ray_package(file.path):
        return file
    return replace(file, stamp="sha256:" + Storage(root).sha256(file.name, file.size))


def _printable(name: str) -> str:
    """Return the name for a message: control characters and bytes that are not UTF-8 are shown as escapes."""
    shown = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), name)
    return shown.encode("utf-8", "backslashreplace").decode()


def _is_utf8(text: str) -> bool:
    """Return whether the text can be encoded. Bytes of a local name that are not UTF-8 are lone surrogates in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_visible(name: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in name.split("/"))


def _has_magic(path: str) -> bool:
    return any(character in path for character in "*?[")


def _glob_root(path: str) -> str:
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _has_magic(part))
    return "/".join(parts[:first])


def _glob_pattern(path: str) -> str:
    return path[len(_glob_root(path)) :].lstrip("/")
