"""Tests of the retry policy, rule by rule."""

import itertools
from dataclasses import replace

import pytest

from pipeline.core.errors import JobFailed
from pipeline.core.types import Assignment, Piece, WorkUnit
from pipeline.driver.retry import (
    CONDEMNED_IN_A_ROW,
    EXCUSED_ATTEMPTS,
    PIECES,
    ROWS_BEFORE_JUDGING,
    START_FAILURES,
    RetryPolicy,
)
from tests.pipeline.cases import one_piece

UNIT = one_piece("abc-0000000100", "/data/in/a.parquet", "a.parquet", 100, 50)
POLICY = RetryPolicy(attempts=3, max_error_rate=0.1)


def test_failures_count_up_to_the_limit_and_the_end_names_unit_file_rows_and_reason() -> None:
    [work] = POLICY.after_failure(Assignment(UNIT), "gone", "save")
    assert (work.attempt, work.failures, work.losses) == (2, 1, 0)
    [work] = POLICY.after_failure(work, "gone", "save")
    with pytest.raises(JobFailed, match=r"unit abc-0000000100 \(a\.parquet, rows 100 to 149\) failed 3 of 3.*: gone"):
        POLICY.after_failure(work, "gone", "save")
    with pytest.raises(JobFailed, match=r"rows 110 to 119\) failed"):
        POLICY.after_failure(replace(work, rows=(10, 20)), "gone", "save")
    with pytest.raises(JobFailed, match=r"failed 3 of 3"):
        replace(POLICY, on_bad_unit="fail").after_failure(work, "gone", "read")


def test_a_unit_of_one_file_that_cannot_be_read_is_set_aside() -> None:
    [work] = POLICY.after_failure(Assignment(UNIT), "gone")
    [work] = POLICY.after_failure(work, "gone")
    assert POLICY.after_failure(work, "gone") == ()


def test_a_unit_of_many_files_that_cannot_be_read_is_split_at_the_borders_of_files() -> None:
    """Each range has one more attempt. One with a single file is set aside then. A broken part sets the unit aside at
    once, because its rows are not the cause."""
    pieces = [Piece(f"/in/{n}", f"{n}", 0, 1 + n % 3, 1, "s") for n in range(20)]
    unit = WorkUnit("u", tuple(pieces))
    tired = Assignment(unit, 3, failures=2)
    ranges = POLICY.after_failure(tired, "gone")
    assert len(ranges) == PIECES
    assert ranges[0].rows == (0, unit.starts[2])
    assert ranges[-1].span[1] == unit.row_count
    assert all(first.span[1] == second.span[0] for first, second in itertools.pairwise(ranges))
    assert {each.span[0] for each in ranges} <= set(unit.starts)
    [*_, last] = ranges
    smaller = POLICY.after_failure(last, "gone")
    assert [each.rows for each in smaller] == [
        (start, start + piece.row_count) for start, piece in zip(unit.starts[-3:], pieces[-3:], strict=True)
    ]
    assert POLICY.after_failure(smaller[0], "gone") == ()
    assert POLICY.after_failure(tired, "its part is broken", "part") == ()


def test_a_whole_unit_is_split_after_the_attempts_allowed_and_a_range_at_its_first_loss() -> None:
    [work] = POLICY.after_loss(Assignment(UNIT), "killed")
    assert (work.attempt, work.losses, work.rows, work.suspect) == (2, 1, None, True)
    [work] = POLICY.after_loss(work, "killed")
    pieces = POLICY.after_loss(work, "killed")
    edges = [0, 6, 12, 18, 25, 31, 37, 43, 50]
    assert [(piece.rows, piece.losses, piece.attempt) for piece in pieces] == [
        (rows, 0, 4) for rows in itertools.pairwise(edges)
    ]
    assert {piece.lost_in for piece in pieces} == {()}
    rows = POLICY.after_loss(pieces[1], "killed", begun=False)
    assert [row.rows for row in rows] == [(row, row + 1) for row in range(6, 12)]


def test_a_lone_row_is_condemned_after_the_attempts_allowed() -> None:
    work = Assignment(UNIT, 9, (7, 8))
    for losses in (1, 2):
        [work] = POLICY.after_loss(work, "killed")
        assert (work.losses, work.condemned) == (losses, ())
    [work] = POLICY.after_loss(work, "killed by r7")
    assert (work.rows, work.losses) == ((7, 8), 0)
    text = "the replica died 3 times while it generated this row alone; the last time: killed by r7"
    assert work.condemned == ((7, text),)


def test_a_lone_row_is_not_condemned_in_one_slot_if_another_one_can_generate_it() -> None:
    """It goes to another slot first, even if it has had its attempts."""
    work = Assignment(UNIT, 9, (7, 8), losses=2, lost_in=("r1",))
    [again] = POLICY.after_loss(work, "killed", slot="r1", elsewhere=lambda slots: slots == ("r1",))
    assert (again.losses, again.lost_in, again.condemned) == (3, ("r1",), ())
    [gone] = POLICY.after_loss(again, "killed", slot="r0", elsewhere=lambda _slots: True)
    assert gone.condemned
    assert POLICY.after_loss(work, "killed", slot="r1")[0].condemned, "there is no other slot"


def test_a_lone_row_is_not_blamed_for_what_dies_before_it_is_generated_unless_again_and_again() -> None:
    work = Assignment(UNIT, 9, (7, 8), losses=1)
    for early in (1, 2, 3):
        [work] = POLICY.after_loss(work, "killed", begun=False)
        assert (work.losses, work.early_losses, work.attempt) == (1, early, 9 + early)
    [work] = POLICY.after_loss(work, "killed", begun=False)
    assert (work.losses, work.condemned) == (2, ())
    [work] = POLICY.after_loss(work, "killed", begun=False)
    assert work.condemned


def test_a_unit_that_had_not_begun_is_no_suspect_unless_again_and_again() -> None:
    """A replica holds many units, and a row in one of them kills it. If the replica dies while it reads the unit every
    time, the unit becomes a suspect all the same. The ranges of a suspect start with a clean sheet."""
    work = Assignment(UNIT)
    for early in (1, 2, 3):
        [work] = POLICY.after_loss(work, "killed", begun=False)
        assert (work.losses, work.early_losses, work.attempt, work.suspect) == (0, early, 1 + early, False)
    for losses in (1, 2):
        [work] = POLICY.after_loss(work, "killed", begun=False)
        assert (work.losses, work.early_losses, work.suspect) == (losses, 3, True)
    assert {piece.early_losses for piece in POLICY.after_loss(work, "killed", begun=False)} == {0}


def test_a_unit_of_one_row_goes_out_as_a_range_before_its_row_is_condemned() -> None:
    """A unit shares its replica with another unit, which may be what killed the replica."""
    policy = RetryPolicy(1, 0.1)
    [work] = policy.after_loss(Assignment(UNIT.part(0, 1)), "killed")
    assert (work.rows, work.losses, work.condemned, work.suspect) == ((0, 1), 0, (), True)
    [work] = policy.after_loss(work, "killed")
    assert work.condemned == ((0, "the replica died once while it generated this row alone; the last time: killed"),)


@pytest.mark.parametrize("rows", [None, (3, 9), (3, 4)])
def test_an_excused_loss_changes_nothing_but_the_attempt(rows: tuple[int, int] | None) -> None:
    work = Assignment(UNIT, 5, rows, losses=2)
    assert POLICY.after_loss(work, "told to leave", excused=True) == (replace(work, attempt=6),)


def test_a_unit_is_not_excused_for_ever() -> None:
    [work] = POLICY.after_loss(Assignment(UNIT, EXCUSED_ATTEMPTS), "told to leave", excused=True)
    assert work.losses == 1


def test_what_has_no_row_to_generate_is_tried_a_few_times_and_never_split() -> None:
    patient = RetryPolicy(attempts=1, max_error_rate=0.1)
    work = Assignment(UNIT, condemned=((7, "it kills"),))
    for losses in range(1, START_FAILURES):
        [work] = patient.after_loss(work, "killed", finished=True)
        assert (work.losses, work.condemned) == (losses, ((7, "it kills"),))
    with pytest.raises(JobFailed, match=r"has no row left to generate, and yet 3 replicas died with it.*: killed"):
        patient.after_loss(work, "killed", finished=True)


def test_rows_condemned_one_after_the_other_end_the_job() -> None:
    POLICY.check_condemned(CONDEMNED_IN_A_ROW - 1, "killed")
    with pytest.raises(JobFailed, match=r"10 rows one after the other killed every replica .* the last time: killed"):
        POLICY.check_condemned(CONDEMNED_IN_A_ROW, "killed")


def test_controls_that_fail_at_the_judgement_end_the_job() -> None:
    POLICY.check_judgement(START_FAILURES - 1, 4, "killed")
    with pytest.raises(JobFailed, match=r"4 rows killed .* 3 replicas died with a control prompt .* time: killed"):
        POLICY.check_judgement(START_FAILURES, 4, "killed")


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
