"""Reads an object of S3 together with the facts about it, in one request. s3fs itself needs two."""

from typing import Any


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
