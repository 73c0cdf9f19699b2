"""Looks at a file of the input, or fetches it whole, and refuses it if it is not the one that was planned."""

from pipeline.core.errors import InputError, StorageError
from pipeline.core.types import Piece
from pipeline.storage.storage import FileInfo, Storage, split_path, split_url
from pipeline.storage.urls import safe_url


def check_unchanged(planned: Piece) -> int:
    """Return the size in bytes of a piece's file. Raises InputError if the file is gone or is not the one that was
    planned, StorageError if the storage fails."""
    storage, name = split_url(planned.file)
    return _compare(planned, storage.stat(name))


def fetch_whole(piece: Piece, storage: Storage | None = None) -> bytes:
    """Return the bytes of a piece's whole file, which must have the size that was planned.

    `storage`: the folder of the file, if it is open already. Raises InputError and StorageError as check_unchanged
    does.
    """
    folder, name = split_path(piece.file)
    storage = storage or Storage(folder)
    try:
        data, info = storage.read_version(name, piece.size)
    except StorageError:
        _compare(piece, storage.stat(name))  # says so if the file is gone or shorter now
        raise
    _compare(piece, info)
    return data


def _compare(planned: Piece, info: FileInfo | None) -> int:
    """Return the size of a file, given its facts now. Raises InputError if it is not the one that was planned."""
    if info is None:
        raise InputError(f"input {safe_url(planned.file)} is gone: it was there when the job was planned")
    # The stamp is a checksum only for files in Ray's package. Nobody rewrites these, so their size is enough.
    changed = info.stamp != planned.stamp and not planned.stamp.startswith("sha256:")
    if planned.size >= 0 and (info.size != planned.size or changed):
        raise InputError(
            f"input {safe_url(planned.file)} has changed since the job was planned ({planned.size} bytes, "
            f"{planned.stamp} then; {info.size} bytes, {info.stamp} now): submit the job again"
        )
    return info.size
