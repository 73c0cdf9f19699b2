"""When to try again and when to give up: pure rules, no clock, no storage, no cluster."""

from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.core.errors import JobFailed
from pipeline.core.types import Assignment

ROWS_BEFORE_JUDGING = 100
"""A share of errors means little below this many rows; at the end of the job it counts whatever the number."""
START_FAILURES = 3
"""Replicas that die before they are ready, one after the other and none working, until the job gives up. Also those
that die with work that has nothing to generate."""
PIECES = 8
"""Ranges that a unit which kills is split into, and each of them again. Halves would cost three times as many replicas,
each with minutes of loading; the pieces that do not kill cost a reading of the unit each."""
CONDEMNED_IN_A_ROW = 10
"""Rows condemned one after the other, without any generated in between, until the job gives up."""
EXCUSED_ATTEMPTS = 20
"""Attempts of a unit after which no loss is excused any more: something else than spot notices ends its replicas."""


def describe(work: Assignment) -> str:
    """The unit, or a range of it, as an operator looks for it: id, file and rows (from 0, both ends included)."""
    unit, (first, end) = work.unit, work.span
    return f"unit {unit.id} ({unit.name}, rows {unit.first_row + first} to {unit.first_row + end - 1})"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The job's `retry` settings as rules. Every method raises JobFailed where the job must end."""

    attempts: int
    """Losses of a unit or of a lone row until it is split or condemned; failures of a unit until the job ends."""
    max_error_rate: float
    """Share of error rows, 0 to 1, above which the job ends."""

    def after_loss(
        self, work: Assignment, reason: str, *, excused: bool = False, finished: bool = False, begun: bool = True
    ) -> tuple[Assignment, ...]:
        """What is to be done instead of work whose replica was lost: the same again, pieces of it, or a row condemned.

        `excused`: the loss is no row's fault. `finished`: all rows of the unit stand in segments, so that none of them
        can be what kills. `begun`: the replica had read the work; a lone row is not blamed before, unless that happens
        as often as it may kill: then it may be the reading. A row is condemned after at most `attempts` losses of its
        unit, one of each range around it (their number is the logarithm, to base PIECES, of the unit's rows) and
        `attempts` of its own.
        """
        excused = excused and work.attempt < EXCUSED_ATTEMPTS
        early = not excused and not begun and work.lone and work.early_losses < self.attempts
        if excused or early:
            return (replace(work, attempt=work.attempt + 1, early_losses=work.early_losses + early),)
        again = replace(work, attempt=work.attempt + 1, losses=work.losses + 1)
        if finished or work.condemned is not None:
            self._check_harmless(again, reason)
            return (again,)
        if again.losses < self.attempts and (work.rows is None or work.lone):
            return (again,)
        if work.lone:
            times = "once" if self.attempts == 1 else f"{self.attempts} times"
            text = f"the replica died {times} while it generated this row alone; the last time: {reason}"
            return (replace(again, losses=0, condemned=text),)
        first, end = work.span
        pieces = min(PIECES, end - first)
        edges = [first + (end - first) * piece // pieces for piece in range(pieces + 1)]
        return tuple(replace(again, rows=rows, losses=0) for rows in pairwise(edges))

    def after_failure(self, work: Assignment, reason: str) -> Assignment:
        """The same work again, which a living replica could not read or publish."""
        failures = work.failures + 1
        if failures >= self.attempts:
            raise JobFailed(
                f"{describe(work)} failed {failures} of {self.attempts} attempts (retry.attempts); "
                f"the last time: {reason}"
            )
        return replace(work, attempt=work.attempt + 1, failures=failures)

    def check_condemned(self, in_a_row: int, reason: str) -> None:
        """Judge the number of rows condemned one after the other, without any row generated in between."""
        if in_a_row >= CONDEMNED_IN_A_ROW:
            raise JobFailed(
                f"{in_a_row} rows one after the other killed every replica that had them, and none was generated in "
                f"between: it is rather the replicas than the rows; the last time: {reason}; see the replicas' logs, "
                "and submit the job again"
            )

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

    def _check_harmless(self, work: Assignment, reason: str) -> None:
        if work.losses >= max(self.attempts, START_FAILURES):
            raise JobFailed(
                f"{describe(work)} has no row left to generate, and yet {work.losses} replicas died "
                f"with it; the last time: {reason}; see the replicas' logs, and submit the job again"
            )
