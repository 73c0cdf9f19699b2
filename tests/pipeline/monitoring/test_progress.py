"""Tests of progress: which rows are counted, which are taken back, and how the text reads."""

import io

import pytest
from rich.console import Console

from pipeline.core.events import RangeDone, ReplicaLost, ReplicaNote, ReplicaReady, UnitDone, UnitFailed, UnitProgress
from pipeline.core.text import duration
from pipeline.core.types import Assignment, Totals, UnitResult
from pipeline.monitoring.progress import BarDisplay, LineDisplay, Progress, open_display, run_progress, show_run
from pipeline.monitoring.telemetry import Telemetry
from tests.pipeline.cases import one_piece


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def result(unit_id: str, rows: int, errors: int = 0, tokens: int = 0, by_other: bool = False) -> UnitResult:
    totals = Totals(rows=rows, ok=rows - errors, errors=errors, completion_tokens=tokens)
    return UnitResult(unit_id, totals, 1.0, "", "a", 1, by_other)


def test_resumed_rows_are_done_but_not_in_the_rate() -> None:
    clock = Clock()
    telemetry = Telemetry(1000, [result("u0", 400, errors=4, tokens=9999)], clock=clock)
    telemetry.take(ReplicaReady("a"))
    clock.now += 30  # loading the model is not in the rate either
    telemetry.take(None)
    telemetry.take(UnitProgress("a", ("u1", None), 0, 0, 0))
    for _ in range(10):
        clock.now += 1
        done = telemetry.snapshot().rows - 400 + 10
        telemetry.take(UnitProgress("a", ("u1", None), done, 1, done * 20))
    now = telemetry.snapshot()
    assert (now.rows, now.errors, now.replicas) == (500, 5, 1)
    assert now.tokens_per_s == pytest.approx(200, rel=0.12)
    assert now.eta_s == pytest.approx(50, rel=0.12)


def test_rows_of_a_lost_replica_are_taken_back_and_a_finished_unit_counts_once() -> None:
    telemetry = Telemetry(100, clock=Clock())
    telemetry.take(ReplicaReady("a"))
    telemetry.take(UnitProgress("a", ("u0", None), 30, 2, 300))
    telemetry.take(ReplicaLost("a", "killed"))
    assert (telemetry.snapshot().rows, telemetry.snapshot().errors, telemetry.snapshot().replicas) == (0, 0, 0)
    telemetry.take(UnitProgress("b", ("u0", None), 50, 2, 500))
    telemetry.take(UnitDone(result("u0", 60, errors=2, tokens=600)))
    assert (telemetry.snapshot().rows, telemetry.snapshot().errors) == (60, 2)
    assert telemetry.tokens == 300 + 600


def test_rows_kept_from_segments_are_done_but_not_computed() -> None:
    clock = Clock()
    telemetry = Telemetry(1000, clock=clock)
    telemetry.take(UnitProgress("a", ("u0", None), 600, 3, 6000, 600, 6000))
    clock.now += 20  # nothing is generated yet: not in the rate
    telemetry.take(None)
    for second in range(1, 11):
        clock.now += 1
        telemetry.take(UnitProgress("a", ("u0", None), 600 + 10 * second, 3, 6000 + 100 * second, 600, 6000))
    now = telemetry.snapshot()
    assert (now.rows, now.errors) == (700, 3)
    assert now.tokens_per_s == pytest.approx(100, rel=0.12)
    telemetry.take(UnitDone(result("u0", 710, errors=3, tokens=7100), 600, 6000))
    assert telemetry.snapshot().rows == 710
    assert telemetry.tokens == 1100


def test_rows_of_ranges_count_once_until_their_unit_is_done() -> None:
    telemetry = Telemetry(100, clock=Clock())
    telemetry.take(UnitProgress("a", ("u0", (0, 50)), 40, 4, 400))
    telemetry.take(RangeDone("a", ("u0", (0, 50))))
    telemetry.take(ReplicaLost("a", "killed"))
    assert (telemetry.snapshot().rows, telemetry.snapshot().errors) == (50, 4)
    telemetry.take(RangeDone("b", ("u0", (50, 60))))
    assert telemetry.snapshot().rows == 60
    telemetry.take(UnitProgress("b", ("u0", None), 60, 4, 600, 60, 600))
    assert telemetry.snapshot().rows == 60
    telemetry.take(UnitDone(result("u0", 60, errors=5, tokens=600), 60, 600))
    assert (telemetry.snapshot().rows, telemetry.snapshot().errors, telemetry.tokens) == (60, 5, 400)


def test_old_samples_leave_the_rate() -> None:
    clock = Clock()
    telemetry = Telemetry(10_000, clock=clock)
    for second in range(200):
        clock.now += 1
        tokens = second * 10 if second < 100 else 1000 + (second - 100) * 50
        telemetry.take(UnitProgress("a", ("u0", None), second, 0, tokens))
    assert telemetry.snapshot().tokens_per_s == pytest.approx(50, rel=0.05)


def test_the_line_reads_well() -> None:
    telemetry = Telemetry(12_000, clock=Clock())
    assert (
        run_progress(telemetry.snapshot()).text == "0/12,000 rows (0.0%) · 0 tokens/s · 0 errors · ETA ? · 0 replicas"
    )


@pytest.mark.parametrize(("seconds", "text"), [(48.2, "48s"), (200, "3m20s"), (7500, "2h05m"), (356_400, "4d03h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_every_few_seconds_losses_at_once_and_the_end() -> None:
    clock, out = Clock(), io.StringIO()
    telemetry, display = Telemetry(100, clock=clock), LineDisplay(out, 5.0, clock)
    for _ in range(12):
        clock.now += 1
        show_run(display, telemetry, None)
    assert len(out.getvalue().splitlines()) == 1  # unchanged lines are not repeated
    show_run(display, telemetry, UnitFailed("a", Assignment(one_piece("u0", "/f", "f", 0, 1)), "storage said no"))
    show_run(display, telemetry, ReplicaLost("a", "node gone"))
    show_run(display, telemetry, ReplicaNote("b", "memory ran out"))
    telemetry.take(UnitDone(result("u0", 100, tokens=10)))
    display.show(run_progress(telemetry.snapshot()))
    lines = out.getvalue().splitlines()
    assert lines[1] == "unit u0 failed on replica a: storage said no"
    assert lines[2] == "replica a was lost: node gone"
    assert lines[3] == "b: memory ran out"
    assert lines[-1].startswith("100/100 rows (100.0%)")
    assert "\x1b" not in out.getvalue()


def test_an_unchanged_line_is_repeated_on_request() -> None:
    out = io.StringIO()
    display = LineDisplay(out, repeats=True)
    for _ in range(2):
        display.show(Progress("0/64 rows", 0, 64))
    assert out.getvalue() == "0/64 rows\n0/64 rows\n"


@pytest.mark.parametrize("transient", [False, True])
def test_a_terminal_gets_a_bar(transient: bool) -> None:
    out = io.StringIO()
    bar = BarDisplay(Console(file=out, force_terminal=True, width=120), transient=transient)
    bar.show(Progress("50/100 rows (50.0%)", 50, 100))
    assert bar.due()
    bar.tell("something [happened]")
    bar.show(Progress("the next piece"))
    bar.close()
    for text in ("50/100 rows (50.0%)", "something [happened]", "the next piece"):
        assert text in out.getvalue()
    assert isinstance(open_display(io.StringIO()), LineDisplay)


def eta_of(telemetry: Telemetry) -> str:
    return run_progress(telemetry.snapshot()).text.split(" · ")[3]


def test_the_time_left_is_not_made_up() -> None:
    """It is unknown before the first rows, while rows are only taken back, and while all rows are finished but a unit
    cannot be published. At the end it is 0, also if the last minute had no rows."""
    clock = Clock()
    telemetry = Telemetry(20, [result("u0", 10)], total_units=2, clock=clock)
    assert eta_of(telemetry) == "ETA ?"
    telemetry.take(ReplicaReady("a"))
    for rows in (0, 5):
        clock.now += 5
        telemetry.take(UnitProgress("a", ("u1", None), rows, rows, 0))  # error rows: they have no tokens
    assert eta_of(telemetry) == "ETA 5s"
    telemetry.take(ReplicaLost("a", "killed"))
    clock.now += 200
    telemetry.take(None)
    assert eta_of(telemetry) == "ETA ?"
    telemetry.take(ReplicaReady("b"))
    telemetry.take(UnitProgress("b", ("u1", None), 10, 10, 0))
    clock.now += 1
    assert eta_of(telemetry) == "ETA ?"
    telemetry.take(UnitDone(result("u1", 10, errors=10)))
    clock.now += 200
    telemetry.take(None)
    assert eta_of(telemetry) == "ETA 0s"
    assert run_progress(Telemetry(0, clock=clock).snapshot()).text.startswith("0/0 rows (100.0%) · 0 tokens/s")
