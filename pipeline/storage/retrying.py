"""Retries failing storage operations after random, growing waits, logs a warning, and raises a clear error in the end.

Only this module retries: the retries of the storage libraries are off.
"""

import logging
import os
import time
from collections.abc import Callable
from math import inf
from typing import TypeVar

from tenacity import RetryCallState, Retrying, stop_after_delay, wait_random_exponential

from pipeline.core.errors import StorageError
from pipeline.storage.failures import cause, is_refusal, is_storage_failure, is_transient

T = TypeVar("T")
PATIENCE_S, LOCAL_PATIENCE_S = 300.0, 10.0
"""Seconds for which a failing operation is retried: on a store behind a URL, and on a local disk."""
STRANGER_PATIENCE_S = 30.0
"""Seconds for which an operation is retried on a store that has not answered this process yet.

It is shorter because a wrong address is more likely there than an outage.
"""
REFUSED_PATIENCE_S = 60.0
"""Seconds for which an operation is retried that a store refuses although it has allowed such operations before.

Credentials that are renewed, or rights that are set anew, take seconds. Longer pauses are made by those who call.
"""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
"""The wait before a retry is random, from 0 to a limit in seconds that begins at FIRST_WAIT_S and doubles with each
retry, up to LONGEST_WAIT_S."""
NOTICE_S = 10.0
"""Seconds after which a warning is logged about an operation that keeps failing, once per operation."""
_answered: set[tuple[str, str, bool]] = set()
"""The stores that have answered this process: the URL of the bucket, the endpoint, and whether the answer was to a
write.

It is not kept at the file system object, of which every thread has another one.
"""
_log = logging.getLogger(__name__)


def call_with_retries(what: str, patience_s: float, call: Callable[[], T], refused_s: float = 0.0) -> T:
    """Call `call` until it succeeds and return its result. After `patience_s` seconds it is not called again, and after
    `refused_s` seconds not if the store refused it then (see is_refusal).

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

    def patience_with(error: BaseException) -> float:
        return patience_s if is_transient(error) else min(refused_s, patience_s) if is_refusal(error) else 0.0

    def may_pass(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return error is not None and (state.seconds_since_start or 0.0) < patience_with(error)

    retrying = Retrying(
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        retry=may_pass,
        before=count_from_first,
        before_sleep=_Notice(what, patience_with),
        reraise=True,
    )
    try:
        return retrying(again)
    except Exception as error:
        # A ValueError is about the path: the file system does not allow such a name.
        if not is_storage_failure(error) and not isinstance(error, ValueError):
            raise
        tried = f" (tried {retrying.statistics['attempt_number']} times in {patience_with(error):g} s)"
        raise StorageError(f"{what}: {_cause(error)}{tried if patience_with(error) else ''}") from error


def call_store(what: str, bucket: str, call: Callable[[], T], *, writes: bool, longest_s: float = inf) -> T:
    """Call `call` as call_with_retries does, for as long as is right for a store behind a URL.

    `bucket`: the URL of the bucket or host. `writes`: the call changes something there; the rights for that may differ
    from those to read. `longest_s`: the most seconds for which it is called again.
    """
    same, other = ((bucket, os.environ.get("AWS_ENDPOINT_URL", ""), kind) for kind in (writes, not writes))
    known = same in _answered or other in _answered
    patience_s = min(longest_s, PATIENCE_S if known else min(STRANGER_PATIENCE_S, PATIENCE_S))
    refused_s = min(longest_s, REFUSED_PATIENCE_S if same in _answered else 0.0)
    result = call_with_retries(what, patience_s, call, refused_s)
    _answered.add(same)
    return result


class _Notice:
    """A callback for tenacity, called after each failed try. It logs once that the operation keeps failing."""

    def __init__(self, what: str, patience_with: Callable[[BaseException], float]) -> None:
        self._what, self._patience_with, self._told = what, patience_with, False

    def __call__(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and not self._told and (state.seconds_since_start or 0.0) >= NOTICE_S:
            self._told = True
            patience_s = self._patience_with(error)
            _log.warning("%s: %s; trying again for up to %g s in all", self._what, _cause(error), patience_s)


def _cause(error: BaseException) -> str:
    return "no whole answer in time" if isinstance(error, TimeoutError) and not str(error) else cause(error)
