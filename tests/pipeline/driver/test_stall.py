"""Tests of the stall watch: replicas without progress are found in time, and slow, idle or new ones are left alone."""

import pytest

from pipeline.core.errors import JobFailed
from pipeline.core.events import ReplicaActive, ReplicaReady, UnitDone, UnitProgress
from pipeline.core.types import Totals, UnitResult
from pipeline.driver.stall import StallWatch
from pipeline.monitoring.telemetry import Telemetry

LIMIT = 600.0


class Watched:
    """A stall watch with its telemetry, at a time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.telemetry = Telemetry(100, clock=lambda: self.now)
        self.watch = StallWatch(self.telemetry, LIMIT)

    def at(self, minute: float, *busy: str, **beats: int) -> list[tuple[str, str]]:
        """Return the replicas that are dropped at this minute, and why, after these replicas have reported these
        beats."""
        self.now = 60 * minute
        for replica in busy:
            if replica not in self.telemetry.replicas:
                self.telemetry.take(ReplicaReady(replica))
        for replica, beat in beats.items():
            self.telemetry.take(ReplicaActive(replica, beat, f"step {beat}"))
        return self.watch.check(busy)


def test_a_replica_without_a_new_beat_is_dropped_and_its_neighbour_is_not() -> None:
    watched = Watched()
    assert watched.at(0, "a", "b") == []
    assert watched.at(5, "a", "b", a=1, b=1) == []
    assert watched.at(14, "a", "b", a=1, b=2) == []
    assert watched.at(15, "a", "b", a=1, b=2) == [
        ("a", "no progress for 10 minutes (retry.stall_minutes), last: step 1")
    ]
    assert watched.at(16, "b", b=3) == []


def test_one_that_was_never_heard_of_is_dropped_too() -> None:
    watched = Watched()
    watched.at(0, "a")
    said = "no progress for 10 minutes (retry.stall_minutes), last: no report since it got work"
    assert watched.at(10, "a") == [("a", said)]


def test_the_time_runs_only_while_it_holds_work() -> None:
    watched = Watched()
    watched.at(0, "a", a=1)
    assert watched.at(9) == []  # idle
    assert watched.at(50, "a") == []
    assert watched.at(51, "a", a=1) == []
    assert watched.at(60, "a", a=1) == []
    assert watched.at(61, "a", a=1) != []


def test_a_replacement_that_stands_still_as_well_ends_the_job_and_says_what_each_was_doing() -> None:
    watched = Watched()
    watched.at(0, "r0", "r1")
    assert [replica for replica, _ in watched.at(11, "r0", "r1", r0=0, r1=0)] == []
    assert [replica for replica, _ in watched.at(21, "r0", "r1", r0=0, r1=0)] == ["r0", "r1"]
    watched.at(22, "r0.2", "r1.2")
    doing = r"r0: step 0; r1: step 0; r0\.2: no report since it got work"
    with pytest.raises(JobFailed, match=rf"no replica made progress for 32 minutes .* doing: {doing}"):
        watched.at(32, "r0.2", "r1.2")


@pytest.mark.parametrize("sign", ["row", "unit"])
def test_rows_that_are_generated_meanwhile_keep_the_job_going(sign: str) -> None:
    watched = Watched()
    watched.at(0, "a")
    assert len(watched.at(10, "a")) == 1
    watched.at(11, "b")
    if sign == "row":
        watched.telemetry.take(UnitProgress("b", ("u0", None), 9, 0, 90, 5, 50))
    else:
        watched.telemetry.take(UnitDone(UnitResult("u1", Totals(), 1.0, "", "c", 1)))
    assert len(watched.at(21, "b")) == 1


def test_rows_kept_from_segments_are_no_progress() -> None:
    watched = Watched()
    watched.at(0, "a")
    watched.at(10, "a")
    watched.at(11, "b")
    watched.telemetry.take(UnitProgress("b", ("u0", None), 5, 0, 50, 5, 50))
    with pytest.raises(JobFailed):
        watched.at(21, "b")
