"""When to try again and when to give up: pure rules, no clock, no storage, no cluster."""

from dataclasses import dataclass

from pipeline.errors import JobFailed
from pipeline.types import WorkUnit

ROWS_BEFORE_JUDGING = 100
"""A share of errors means little below this many rows; at the end of the job it counts whatever the number."""
START_FAILURES = 3
"""Replicas that die before they are ready, one after the other and none working, until the job gives up."""


def describe(unit: WorkUnit) -> str:
    """The unit as an operator looks for it: id, file and rows (counted from 0, both ends included)."""
    last = unit.first_row + unit.row_count - 1
    return f"unit {unit.id} ({unit.name}, rows {unit.first_row} to {last})"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The job's `retry` settings as rules. Every method raises JobFailed where the job must end."""

    attempts: int
    """Times a unit is tried before the job ends."""
    max_error_rate: float
    """Share of error rows, 0 to 1, above which the job ends."""

    def next_attempt(self, unit: WorkUnit, attempt: int, reason: str) -> int:
        """The number of the attempt that follows `attempt`, which failed for `reason`."""
        if attempt >= self.attempts:
            raise JobFailed(
                f"{describe(unit)} failed {attempt} of {self.attempts} attempts (retry.attempts); "
                f"the last time: {reason}"
            )
        return attempt + 1

    def check_errors(self, errors: int, rows: int, *, ended: bool = False) -> None:
        """Judge `errors` among `rows`: finished rows at the end, else all rows of the units begun.

        Counting the rows of a begun unit that are still to come, and none of them as an error, keeps a unit whose bad
        rows happen to be known first from ending a job that is within its limit.
        """
        if rows < (1 if ended else ROWS_BEFORE_JUDGING) or errors <= self.max_error_rate * rows:
            return
        raise JobFailed(
            f"{errors} of {rows} rows are error rows ({errors / rows:.1%}), above retry.max_error_rate "
            f"({self.max_error_rate:.1%}); see the `error` column of the parts, mend the input or raise the limit, "
            "and submit the job again"
        )

    def check_start(self, failures: int, *, refused: bool, working: bool, reason: str) -> None:
        """Judge the `failures` in a row of replicas that died before they were ready.

        `refused`: start-up raised one of the project's own errors (a checkpoint that does not load), which the next
        replica would raise again. While another replica is `working`, the job goes on with what it has.
        """
        if working or (not refused and failures < START_FAILURES):
            return
        raise JobFailed(
            f"no replica could start: {reason}" if refused else f"{failures} replicas died while starting: {reason}"
        )
