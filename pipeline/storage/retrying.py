"""Retries failing storage operations after random, growing waits, logs a warning, and raises a clear error in the end.

Only this module retries: the retries of the storage libraries are off.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from pipeline.core.errors import StorageError
from pipeline.storage.urls import cause, is_storage_failure, is_transient

T = TypeVar("T")
PATIENCE_S, LOCAL_PATIENCE_S = 300.0, 10.0
"""Seconds for which a failing operation is retried: on a store behind a URL, and on a local disk."""
STRANGER_PATIENCE_S = 30.0
"""Seconds for which an operation is retried on a store that has not answered this process yet.

It is shorter because a wrong address is more likely there than an outage.
"""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
"""The wait before a retry is random, from 0 to a limit in seconds that begins at FIRST_WAIT_S and doubles with each
retry, up to LONGEST_WAIT_S."""
NOTICE_S = 10.0
"""Seconds after which a warning is logged about an operation that keeps failing, once per operation."""
_BROKEN_ON_THE_WAY = ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")  # S3's codes for damaged uploads
_log = logging.getLogger(__name__)


def call_with_retries(what: str, patience_s: float, call: Callable[[], T]) -> T:
    """Call `call` until it succeeds and return its result. After `patience_s` seconds it is not called again.

    `what` begins the error message, such as "cannot read s3://…". Raises StorageError if the storage fails and a retry
    cannot help or did not help, or for a ValueError. Any other error is a fault of the program and is raised unchanged.
    """
    began = time.monotonic()
    try:
        # Nearly every call succeeds at once, and tenacity needs more time to start than a small file to be read.
        return call()
    except Exception as error:
        first = [error]

    def again() -> T:
        if first:
            raise first.pop()
        return call()

    def count_from_first(state: RetryCallState) -> None:
        state.start_time = began

    retrying = Retrying(
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        retry=retry_if_exception(_may_pass),
        before=count_from_first,
        before_sleep=_Notice(what, patience_s),
        reraise=True,
    )
    try:
        return retrying(again)
    except Exception as error:
        # A ValueError is about the path: the file system does not allow such a name.
        if not is_storage_failure(error) and not isinstance(error, ValueError):
            raise
        tried = f" (tried {retrying.statistics['attempt_number']} times in {patience_s:g} s)"
        raise StorageError(f"{what}: {_cause(error)}{tried if _may_pass(error) else ''}") from error


class _Notice:
    """A callback for tenacity, called after each failed try. It logs once that the operation keeps failing."""

    def __init__(self, what: str, patience_s: float) -> None:
        self._what, self._patience_s, self._told = what, patience_s, False

    def __call__(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and not self._told and (state.seconds_since_start or 0.0) >= NOTICE_S:
            self._told = True
            _log.warning("%s: %s; trying again for up to %g s in all", self._what, _cause(error), self._patience_s)


def _may_pass(error: BaseException) -> bool:
    answer = getattr(error.__cause__, "response", None)
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    return is_transient(error) or code in _BROKEN_ON_THE_WAY


def _cause(error: BaseException) -> str:
    return "no whole answer in time" if isinstance(error, TimeoutError) and not str(error) else cause(error)
