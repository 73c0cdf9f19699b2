"""Decides what follows a loss, a failure or an error row: a retry, a split, a condemned row, a unit that is set aside
or the end of the job.

The rules need no clock, no storage and no cluster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from pipeline.core.errors import JobFailed
from pipeline.core.text import counted
from pipeline.core.types import ALONE, Assignment

ROWS_BEFORE_JUDGING = 100
"""The number of rows from which on the share of error rows is checked, because the share of fewer rows says little. At
the end of the job it is always checked."""
START_FAILURES = 3
"""The job ends when this many replicas have died one after the other before they were ready, while no other replica was
ready. It also ends when this many replicas (or `attempts`, if that is more) have died with work in which no row is left
to generate."""
PIECES = 8
"""The number of ranges into which a unit that kills replicas is split; a range that kills is split again. Splitting
into halves would kill three times as many replicas, and each replacement has to load the model. The price is that
every range has to read the unit."""
CONDEMNED_IN_A_ROW = 10
"""The number of rows condemned one after the other, with no row generated in between, at which a finished row of their
unit is generated once more as a control. If the unit has none, the job ends."""
EXCUSED_ATTEMPTS = 20
"""The number of attempts at a unit from which on no loss is excused any more: something other than interruptions of
spot instances must be ending its replicas."""


def describe(work: Assignment) -> str:
    """Return a description of a unit, or of a range of it, for the operator: its id, its files, and the numbers of its
    first and last row in them, from 0; `the control prompt` for a control."""
    if work.control:
        return "the control prompt"
    return f"unit {work.unit.id} ({work.unit.describe(*work.span)})"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The rules for retrying and giving up, with the limits in the job's `retry` settings.

    Every method raises JobFailed if the job must end.
    """

    attempts: int
    """The number of losses after which a unit is split or a single row is condemned, and the number of failures after
    which a unit is set aside or the job ends."""
    max_error_rate: float
    """The share of error rows (0 to 1) above which the job ends."""
    on_bad_unit: Literal["set_aside", "fail"] = "set_aside"
    """Whether a unit that cannot be read is set aside, or ends the job."""

    def after_loss(
        self,
        work: Assignment,
        reason: str,
        *,
        excused: bool = False,
        finished: bool = False,
        begun: bool = True,
        slot: str = "",
        elsewhere: Callable[[Sequence[str]], bool] = lambda _slots: False,
    ) -> tuple[Assignment, ...]:
        """Return what replaces work whose replica was lost: the same work again, ranges of it, or a lone row with its
        error text in `condemned`.

        `excused`: the loss is not caused by a row, so it does not count until the unit has had EXCUSED_ATTEMPTS
        attempts. `finished`: all rows of the unit are in segments, so none of them can have killed the replica.
        `begun`: rows of the work may have been in the engine at that time. If not, a whole unit that was never blamed,
        or a range of one row, is not blamed for the first `attempts` such losses: the cause is probably something else
        that the replica held. After that, reading it may be the cause. `slot`: the slot of the replica. `elsewhere`
        returns whether a replica in another slot than the given ones can generate the row: a row is not condemned for
        losses in one slot only if there is such a replica.

        A row is condemned after at most `attempts` losses of its unit, one loss of each range around it (their number
        is the logarithm to base PIECES of the number of rows in the unit) and `attempts` losses of its own, or two in
        different slots if that is more. All losses that count for a range are those of replicas that had generated a
        row or a control (pipeline.driver.work_queue).
        """
        excused = excused and work.attempt < EXCUSED_ATTEMPTS
        early = not (excused or begun) and (work.lone or not work.suspect) and work.early_losses < self.attempts
        if excused or early:
            return (replace(work, attempt=work.attempt + 1, early_losses=work.early_losses + early),)
        slots = work.lost_in if slot in work.lost_in else (*work.lost_in, slot)
        again = replace(work, attempt=work.attempt + 1, losses=work.losses + 1, lost_in=slots)
        if finished:
            self._check_harmless(again, reason)
            return (again,)
        if again.losses < self.attempts and (work.rows is None or work.lone):
            return (again,)
        first, end = work.span
        if work.lone:
            if len(slots) == 1 and elsewhere(slots):
                return (again,)
            times = "once" if again.losses == 1 else f"{again.losses} times"
            text = f"the replica died {times} {ALONE}; the last time: {reason}"
            return (replace(again, losses=0, condemned=((first, text),)),)
        pieces = min(PIECES, end - first)
        edges = [first + (end - first) * piece // pieces for piece in range(pieces + 1)]
        return tuple(replace(again, rows=rows, losses=0, early_losses=0, lost_in=()) for rows in pairwise(edges))

    def after_failure(
        self,
        work: Assignment,
        reason: str,
        stage: Literal["read", "part", "save"] = "read",
        *,
        finished: bool = False,
    ) -> tuple[Assignment, ...]:
        """Return what replaces work that a replica, which is still alive, could not read or publish: the next attempt,
        ranges of whole files of it, or nothing if it is to be set aside.

        `stage`: see UnitFailed. `finished`: the unit was handed out as ranges, and all of them are done. After
        `attempts` failures, work on rows of several files is split, to find the file that cannot be read, and each
        range has one more attempt. A finished unit is not split: its ranges would be done at once without a read,
        because their rows are in segments. Raises JobFailed instead if the work has failed `attempts` times and rows
        cannot be saved, or if `on_bad_unit` is "fail".
        """
        failures = work.failures + 1
        if failures < self.attempts:
            return (replace(work, attempt=work.attempt + 1, failures=failures),)
        if stage == "save" or self.on_bad_unit == "fail":
            advice = (
                "" if stage == "save" else "; repair it, or set retry.on_bad_unit: set_aside to finish all other rows"
            )
            raise JobFailed(
                f"{describe(work)} failed {failures} of {self.attempts} attempts (retry.attempts); "
                f"the last time: {reason}{advice}"
            )
        first, end = work.span
        borders = [start for start in work.unit.starts if first < start < end]
        if stage == "part" or finished or not borders:
            return ()
        starts = [first, *borders]
        pieces = min(PIECES, len(starts))
        edges = [*(starts[len(starts) * piece // pieces] for piece in range(pieces)), end]
        once = replace(work, attempt=work.attempt + 1, losses=0, early_losses=0, lost_in=(), failures=self.attempts - 1)
        return tuple(replace(once, rows=rows) for rows in pairwise(edges))

    def check_condemned(self, in_a_row: int, reason: str) -> None:
        """Raise JobFailed if too many rows were condemned one after the other with none generated in between."""
        if in_a_row >= CONDEMNED_IN_A_ROW:
            raise JobFailed(
                f"{in_a_row} rows one after the other killed every replica that had them, and none was generated in "
                f"between: the cause is probably not the rows but the replicas; the last time: {reason}; no row was "
                "given up for it; see the replicas' logs, and submit the job again"
            )

    def check_judgement(self, failed: int, rows: int, reason: str) -> None:
        """Raise JobFailed if too many replicas died one after the other with a second control prompt, which was to show
        that `rows` condemned rows, and not the replicas, were the cause of the deaths before."""
        if failed >= START_FAILURES:
            raise JobFailed(
                f"{counted(rows, 'row')} killed every replica that had them, but then {failed} replicas died with a "
                f"control prompt as well: the cause is probably not the rows but the replicas; the last time: {reason}"
                "; no row was given up for it; see the replicas' logs, and submit the job again"
            )

    def check_errors(self, errors: int, rows: int, *, ended: bool = False) -> None:
        """Raise JobFailed if the share of `errors` among `rows` exceeds max_error_rate.

        `rows`: the number of all rows of the units that have begun or are finished. Rows of a begun unit that are still
        to come count as rows without an error; otherwise a unit whose bad rows are found first could end a job that is
        within its limit. `ended`: the job has no unit left, so the share is checked even with fewer than
        ROWS_BEFORE_JUDGING rows.
        """
        if rows < (1 if ended else ROWS_BEFORE_JUDGING) or errors <= self.max_error_rate * rows:
            return
        raise JobFailed(
            f"{errors} of {rows} rows are error rows ({errors / rows:.1%}), above retry.max_error_rate "
            f"({self.max_error_rate:.1%}); `twotower show OUTPUT --errors` shows those in finished parts. "
            "To accept them, raise the limit and submit the same job again. To repair them, correct the input or the "
            "template and use a new output.path"
        )

    def check_start(self, failures: int, *, refused: bool, working: bool, reason: str) -> None:
        """Raise JobFailed if no replica can start: `failures` of them died one after the other before they were ready.

        `refused`: the last start raised one of the project's own errors (such as a checkpoint that does not load),
        which the next replica would raise again; one such start ends the job. `working`: another replica is ready; the
        job then continues with the replicas that it has. `reason`: why the last one died.
        """
        if working or (not refused and failures < START_FAILURES):
            return
        raise JobFailed(
            f"no replica could start: {reason}" if refused else f"{failures} replicas died while starting: {reason}"
        )

    def _check_harmless(self, work: Assignment, reason: str) -> None:
        """Raise JobFailed if too many replicas died with work that cannot have killed them."""
        if work.losses >= max(self.attempts, START_FAILURES):
            raise JobFailed(
                f"{describe(work)} has no row left to generate, and yet {work.losses} replicas died "
                f"with it; the last time: {reason}; see the replicas' logs, and submit the job again"
            )
