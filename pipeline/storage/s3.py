"""Does what s3fs does not: reads an object together with the facts about it, finds out why the store refuses, and looks
for new credentials."""

import time
from contextlib import suppress
from typing import Any

from fsspec.asyn import sync

from pipeline.storage.failures import STATUS_ONLY, code_of, needs_credentials

LOOK_EVERY_S = 10.0
"""Seconds from one look for new credentials to the next."""


async def get_object(files: Any, path: str, size: int) -> tuple[bytes, dict[str, Any]]:
    """Return at most the first `size` bytes of an object, which must be at least 1, and its facts as s3fs gives them.

    Both are of the same version of the object, because they are from the same answer. `files`: an S3FileSystem, on
    whose event loop this must run. Raises what the requests of s3fs raise.
    """
    bucket, key, _ = files.split_path(path)
    answer = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")
    body = answer["Body"]
    try:
        data = bytes(await body.read())
    finally:
        body.close()
    # `bytes 0-99/1234`; if the server sends the whole object instead, there is no such header
    whole = str(answer.get("ContentRange") or answer["ContentLength"]).rpartition("/")[2]
    facts = {"ETag": answer.get("ETag", ""), "LastModified": answer.get("LastModified", "")}
    return data, {"name": path, "type": "file", "size": int(whole), **facts}


def with_reason(files: Any, path: str, error: OSError, **limit: float) -> OSError:
    """Return the error, or the store's own if this one has only a status: answers to HEAD do not say why it refuses.

    `limit`: the `timeout` of the request for the reason. Raises nothing.
    """
    if code_of(error) not in STATUS_ONLY:
        return error
    bucket, key, _ = files.split_path(path)
    ask = ("get_object", {"Key": key, "Range": "bytes=0-0"}) if key else ("list_objects_v2", {"MaxKeys": 1})
    try:
        answer = sync(files.loop, files._call_s3, ask[0], Bucket=bucket, **ask[1], **limit)
        if "Body" in answer:
            answer["Body"].close()
    except OSError as reason:
        return error if isinstance(reason, FileNotFoundError) or not code_of(reason) else reason
    except Exception:
        return error
    return error


def look_for_credentials(files: Any, error: BaseException) -> None:
    """Let an S3FileSystem read the credentials anew, from the same places, if the error says that they are not valid.

    Whoever renews the credentials in a file may be a moment late. Otherwise they would be read only once by a process.
    """
    now = time.monotonic()
    if needs_credentials(error) and now - getattr(files, "twotower_looked", -LOOK_EVERY_S) >= LOOK_EVERY_S:
        files.twotower_looked = now
        with suppress(Exception):  # the old ones stay; what is wrong with the new ones is no answer to the request
            files.connect(refresh=True)
