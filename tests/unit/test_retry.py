"""The retry policy's rules, one by one."""

import pytest

from pipeline.errors import JobFailed
from pipeline.retry import ROWS_BEFORE_JUDGING, START_FAILURES, RetryPolicy
from pipeline.types import WorkUnit

UNIT = WorkUnit("abc-0000000100", "/data/in/a.parquet", "a.parquet", 100, 50)
POLICY = RetryPolicy(attempts=3, max_error_rate=0.1)


def test_attempts_count_up_to_the_limit_and_the_failure_names_unit_file_rows_and_reason() -> None:
    assert POLICY.next_attempt(UNIT, 1, "gone") == 2
    assert POLICY.next_attempt(UNIT, 2, "gone") == 3
    with pytest.raises(JobFailed, match=r"unit abc-0000000100 \(a\.parquet, rows 100 to 149\) failed 3 of 3.*: gone"):
        POLICY.next_attempt(UNIT, 3, "gone")


@pytest.mark.parametrize(
    ("errors", "rows", "ended", "fails"),
    [
        (10, 100, False, False),
        (11, 100, False, True),
        (50, ROWS_BEFORE_JUDGING - 1, False, False),
        (50, ROWS_BEFORE_JUDGING - 1, True, True),
        (1, 10, True, False),
        (0, 0, True, False),
    ],
)
def test_error_rate_is_judged_after_enough_rows_and_at_the_end(
    errors: int, rows: int, ended: bool, fails: bool
) -> None:
    if not fails:
        POLICY.check_errors(errors, rows, ended=ended)
        return
    with pytest.raises(JobFailed, match=rf"{errors} of {rows} rows are error rows .* above retry.max_error_rate"):
        POLICY.check_errors(errors, rows, ended=ended)


def test_a_limit_of_one_allows_every_row_to_fail_and_zero_allows_none() -> None:
    RetryPolicy(1, 1.0).check_errors(500, 500, ended=True)
    with pytest.raises(JobFailed):
        RetryPolicy(1, 0.0).check_errors(1, 500)


def test_start_up_errors_of_our_own_end_the_job_at_once_and_deaths_after_a_few() -> None:
    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing"):
        POLICY.check_start(1, refused=True, working=False, reason="shard 2 is missing")
    POLICY.check_start(START_FAILURES - 1, refused=False, working=False, reason="killed")
    with pytest.raises(JobFailed, match="3 replicas died while starting: killed"):
        POLICY.check_start(START_FAILURES, refused=False, working=False, reason="killed")
    POLICY.check_start(99, refused=True, working=True, reason="a bad node")
