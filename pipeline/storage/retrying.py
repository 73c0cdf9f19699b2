"""Retries failing storage operations with backoff and jitter, logs a warning, and raises a clear error in the end.

Only this module retries: the retries of the storage libraries are off.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from pipeline.core.errors import StorageError
from pipeline.storage.urls import cause, is_storage_failure, is_transient

T = TypeVar("T")
PATIENCE_S, LOCAL_PATIENCE_S = 300.0, 10.0
"""Seconds for which a failing operation is retried: on a store behind a network, and on a local disk."""
STRANGER_PATIENCE_S = 30.0
"""Seconds for which an operation is retried on a store that has not answered this process yet.

It is shorter because a wrong address is more likely there than an outage.
"""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
NOTICE_S = 10.0
"""Seconds after which an operation that keeps failing is logged, once."""
_BROKEN_ON_THE_WAY = ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")  # S3's codes for damaged uploads
_log = logging.getLogger(__name__)


def call_with_retries(what: str, patience_s: float, call: Callable[[], T]) -> T:
    """Call `call` until it succeeds, for at most `patience_s` seconds, and return its result.

    `what` begins the error message, such as "cannot read s3://…". Raises StorageError if a retry cannot help or did not
    help. An error that is a fault of the program is raised unchanged.
    """
    retrying = Retrying(
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        retry=retry_if_exception(_may_pass),
        before_sleep=_Notice(what, patience_s),
        reraise=True,
    )
    try:
        return retrying(call)
    except Exception as error:
        # A ValueError is about the path: the file system cannot hold such a name.
        if not is_storage_failure(error) and not isinstance(error, ValueError):
            raise
        tried = f" (tried {retrying.statistics['attempt_number']} times in {patience_s:g} s)"
        raise StorageError(f"{what}: {_cause(error)}{tried if _may_pass(error) else ''}") from error


class _Notice:
    """A callback that logs once that an operation keeps failing and is retried."""

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
