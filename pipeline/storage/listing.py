"""Notices listings that are too short, and lists again."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.storage import retrying

T = TypeVar("T")
MORE_LISTINGS = 3
"""The most times that a folder is listed again because its listings contradict themselves or each other."""
_FLAWS, _KNOWN = "twotower_short_pages", "twotower_counts_are_wrong"
_log = logging.getLogger(__name__)


def watch_pages(files: Any) -> None:
    """Let an S3FileSystem count the pages of its listings that hold fewer entries than the store says they do.

    In an answer to ListObjectsV2, KeyCount is the number of entries in it, which s3fs does not look at, and IsTruncated
    says that another page follows, for which NextContinuationToken is needed; without it s3fs fails.
    """
    if hasattr(files, _FLAWS):
        return
    setattr(files, _FLAWS, 0)

    async def watched(method: str, *arguments: Any, **options: Any) -> Any:
        answer = await type(files)._call_s3(files, method, *arguments, **options)
        if method == "list_objects_v2":
            count = len(answer.get("Contents", ())) + len(answer.get("CommonPrefixes", ()))
            lost = bool(answer.get("IsTruncated")) and not answer.get("NextContinuationToken")
            if lost or answer.get("KeyCount", count) > count:
                setattr(files, _FLAWS, getattr(files, _FLAWS) + 1)
            if lost:
                answer["IsTruncated"] = False
        return answer

    files._call_s3 = watched


def list_whole_pages(files: Any, shown: str, list_once: Callable[[], dict[str, T]]) -> dict[str, T]:
    """Return a listing by name. While pages of it hold fewer entries than the store says, list again.

    If this goes on, there is a warning, all entries that any of these listings had are returned, and the counts of this
    store are not believed any more, because some stores may count in another way. `shown`: the folder for messages.
    """
    found: dict[str, T] = {}
    for number in range(MORE_LISTINGS + 1):
        if number:
            pause(number)
        before = getattr(files, _FLAWS, 0)
        listing = list_once()
        if getattr(files, _FLAWS, 0) == before or hasattr(files, _KNOWN):
            return listing
        found |= listing
    setattr(files, _KNOWN, True)
    _log.warning(
        "%s: the store's listing has fewer entries than the store says, each time; all %d that came are used",
        shown,
        len(found),
    )
    return found


def list_until_equal(shown: str, list_once: Callable[[], dict[str, T]]) -> dict[str, T]:
    """Return a listing by name, of a store behind a URL, that two listings after each other agree on.

    A listing that is too short would leave out rows without any error, and a store may answer with one although it
    contradicts nothing, for example because it learns of new files slowly. If no two listings agree, all entries that
    any of them had are returned. Unless the first two agree, there is a warning. `shown`: the folder for messages.
    """
    found = last = list_once()
    counts = [len(last)]
    for number in range(1, MORE_LISTINGS + 1):
        if number > 1:
            pause(number)
        before, last = last, list_once()
        counts.append(len(last))
        if last == before:
            break
        found = found | last
    if last == before:
        found = last
    if len(counts) > 2:
        _log.warning(
            "%s: its listings differ (%s files): %s",
            shown,
            ", ".join(map(str, counts)),
            "the last two agree and are used" if last == before else f"all {len(found)} that came are used",
        )
    return found


def pause(number: int) -> None:
    """Wait before the listing with this number, from 1 on, longer each time."""
    time.sleep(min(retrying.FIRST_WAIT_S * 2 ** (number - 1), retrying.LONGEST_WAIT_S))
