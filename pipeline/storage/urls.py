"""Handles paths and URLs as text; it opens no files."""

import os
import re
import unicodedata
from urllib.parse import unquote

_OBJECT_STORES = (
    *(
        "s3",
        "s3a",
        "s3n",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "adl",
        "wasb",
        "wasbs",
        "oss",
        "cos",
        "cosn",
        "obs",
        "tos",
    ),
    *("bos", "oci", "b2", "r2", "minio", "swift", "hf"),
)
_CONTAINER_AT_ACCOUNT = ("az", "abfs", "abfss", "wasb", "wasbs")
"""Protocols of Azure, in whose URLs the container stands before an @, as in abfs://container@account…/folder."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):///*([^/]*)")
_TOO_MANY_SLASHES = re.compile(r"(?<!file):///+(?=[^/]*(?:@|%40))", re.IGNORECASE)
"""Matches the slashes of a URL with user info that has one too many, as in s3:///key:secret@bucket."""
_SIGNATURE = re.compile(r"[?&](x-amz-signature|x-goog-signature|signature|sig|awsaccesskeyid)=", re.IGNORECASE)
_USER_AND_COLON = r"(?!arn:|\[)[^/@:\s]*?(?::|%3[Aa])(?!:|\d{1,5}(?:[/?#\s\"']|$))"
"""Matches the beginning of user info behind `://`: up to a colon which no port follows, except in an ARN or IPv6."""
_SECRET_WITH_SLASH = re.compile(rf"(?<=://){_USER_AND_COLON}[^@\s]*@")
_SECRET_WITHOUT_AT = re.compile(rf"(?<=://){_USER_AND_COLON}[^/?#\s]*")


def is_local(path: str) -> bool:
    """Return whether the text is a plain local path and no URL. `file:///…` is a URL."""
    return "://" not in path


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path or URL is the folder itself or lies below it. Only the texts are compared."""
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def credentials_flaw(path: str) -> str | None:
    """Return why a path is refused if it holds credentials that do not belong there, and what to do; else None.

    The text has nothing of the path in it but the protocol. URLs of object stores never hold credentials: the libraries
    take what stands before an @ for a part of the bucket's name, and print it. A user and a password in a URL of http,
    ftp or sftp are allowed.
    """
    for protocol, authority in _URL.findall(path):
        if protocol.lower() not in _OBJECT_STORES or authority.startswith("arn:"):
            continue
        authority = unquote(authority)
        user, at, _ = authority.rpartition("@")
        named = ":" in user if at and protocol.lower() in _CONTAINER_AT_ACCOUNT else at or ":" in authority
        if named and not authority.endswith("::"):
            return (
                "credentials do not belong in the URL of an object store, where logs and messages show them: put them "
                "into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), and write "
                f"{protocol.lower()}://bucket/…"
            )
    if not is_local(path) and _SIGNATURE.search(path):
        return "a presigned URL opens one file for some time: use s3://… or abfs://… and credentials in the environment"
    return None


def flaw_of(path: str, *, chains: bool, pattern: bool) -> str | None:
    """Return what a storage library or a reader of the files would misunderstand in the path, and what to do about it.

    Returns None if there is nothing. `chains`: `::` is allowed, as a part of the name; otherwise it would mean a URL
    inside a URL. `pattern`: `*`, `?` and `[` are allowed.
    """
    if why := credentials_flaw(path):
        return why
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
    bare = re.sub(r"(?<=://)[^/]*(?:@|%40)", "", _TOO_MANY_SLASHES.sub("://", url))
    # A password with a slash in it, which should have been written %2F, or one without a host behind it
    bare = _SECRET_WITHOUT_AT.sub("…", _SECRET_WITH_SLASH.sub("", bare)).partition("?")[0]
    # in other URLs the fragment is part of the key
    return bare.partition("#")[0] if bare.startswith(("http://", "https://")) else bare


def in_ray_package(path: str) -> bool:
    """Return whether a path is in Ray's temporary copy of the working directory, which Ray deletes after the job."""
    parts = path.replace(os.sep, "/").split("/")
    return "working_dir_files" in parts and "runtime_resources" in parts
