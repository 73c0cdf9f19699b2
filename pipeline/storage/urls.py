"""Handles paths and URLs as text, and explains errors of the storage libraries; it opens no files."""

import errno
import os
import re
import unicodedata

_FINAL_ERRNOS = frozenset(
    (
        *(errno.EINVAL, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
        *(errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.ELOOP, errno.EDQUOT),
    )
)
_FINAL_TYPES = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_NETWORK_MODULES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "requests", "urllib3")
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}
_FINAL_NAMES = {*_NO_CREDENTIALS, "ProfileNotFound", "ParamValidationError", "NoRegionError"}


def is_local(path: str) -> bool:
    """Return whether the text is a plain local path and no URL. `file:///…` is a URL."""
    return "://" not in path


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path or URL is the folder itself or lies below it. Only the texts are compared."""
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def flaw_of(path: str, *, chains: bool, pattern: bool) -> str | None:
    """Return what a storage library or a reader of the files would misunderstand in the path, and what to do about it.

    Returns None if there is nothing. `chains`: `::` is allowed, as a part of the name; otherwise it would mean a URL
    inside a URL. `pattern`: `*`, `?` and `[` are allowed.
    """
    if any(unicodedata.category(character) == "Cc" for character in path):
        return "it holds a control character: use another name"
    if "::" in path and not chains:
        return "a URL inside a URL (::) is not supported: unpack or copy it first"
    if not is_local(path) and not {".", ".."}.isdisjoint(path.partition("://")[2].split("/")):
        return ". and .. have no meaning in a URL: write it without them"
    if not pattern and any(character in path for character in "*?["):
        return "readers take *, ? and [ for patterns: use another name"
    return None


def safe_url(url: str) -> str:
    """Return the URL for messages: without user, password and query, which may be secret. A local path stays as it is.

    http and https addresses also lose the fragment.
    """
    if "://" not in url:
        return url
    bare = re.sub(r"(?<=://)[^/]*@", "", url).partition("?")[0]
    # in other URLs the fragment is part of the key
    return bare.partition("#")[0] if bare.startswith(("http://", "https://")) else bare


def in_ray_package(path: str) -> bool:
    """Return whether a path is in Ray's temporary copy of the working directory, which Ray deletes after the job."""
    parts = path.replace(os.sep, "/").split("/")
    return "working_dir_files" in parts and "runtime_resources" in parts


def is_storage_failure(error: BaseException) -> bool:
    """Return whether the error comes from the storage: it is an OSError or an error of a network library."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_MODULES


def is_transient(error: BaseException) -> bool:
    """Return whether retrying the operation that raised this error can help.

    It cannot if the error does not come from the storage, or if it stays the same until somebody acts, for example if a
    file, rights, space or credentials are missing.
    """
    if isinstance(error, _FINAL_TYPES) or (isinstance(error, OSError) and error.errno in _FINAL_ERRNOS):
        return False
    return is_storage_failure(error) and type(error).__name__ not in _FINAL_NAMES


def cause(error: BaseException) -> str:
    """Return the text of an error of the storage in one line, without credentials, with what to do if that is known."""
    if isinstance(error, PermissionError):
        return "permission denied; check the rights of the user or of the credentials"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on device; free some: it is tried again, or the job continues when it is submitted again"
    if type(error).__name__ in _NO_CREDENTIALS:
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
    return " ".join(safe_url(word) if "://" in word else word for word in text.split()) or type(error).__name__
