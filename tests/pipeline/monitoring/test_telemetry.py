"""Tests of the reports of a running job: the picture of its state, live.json and the sinks."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.errors import StorageError
from pipeline.core.events import (
    EngineRoom,
    Event,
    ReplicaActive,
    ReplicaLost,
    ReplicaReady,
    ReplicaStats,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import Assignment, Totals, UnitResult
from pipeline.monitoring.live import Live, LiveFile, read_live
from pipeline.monitoring.reporter import SAMPLE_S, Reporter, Sink
from pipeline.monitoring.telemetry import Telemetry
from pipeline.output.layout import LIVE
from pipeline.storage.storage import Storage
from tests.pipeline.cases import one_piece
from tests.pipeline.monitoring.test_progress import Clock
from tests.waiting import PATIENCE_S, wait_until


class Run:
    """The telemetry of a run with its reporter and its clock, which hears events as from a driver."""

    def __init__(self, folder: Path, *sinks: Sink) -> None:
        self.clock, self.pictures, self.told = Clock(), list[Live](), list[str]()
        done = UnitResult("u0", Totals(), 1.0, "", "r0", 1)
        self.telemetry = Telemetry(
            100, [done], total_units=10, fingerprint="ours", clock=self.clock, wall_clock=self.clock
        )
        (folder / "_job").mkdir()  # the folder of a job; it is never created anew by this file
        self.file = LiveFile(str(folder), interval_s=0.02)
        self.reporter = Reporter(self.telemetry, self.file, [*sinks, self.pictures.append], self.told.append)

    def hear(self, *events: Event) -> None:
        for event in events:
            self.telemetry.take(event)


def done(rows: int, **more: Any) -> ReplicaStats:
    return ReplicaStats(rows=rows, tokens=30 * rows, forwards=10 * rows, batched=rows, batch_rows=7.5 * rows, **more)


def test_rates_of_a_replica_are_those_of_the_last_minute(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.hear(ReplicaReady("r0"), ReplicaActive("r0", 0, "reading"))
    for second in range(1, 200):  # a row a second, then two
        run.clock.now += 1
        rows = second if second < 100 else 2 * second - 100
        room = EngineRoom(prefill_tokens=80 * rows, padded_tokens=100 * rows)
        run.hear(ReplicaActive("r0", second, "generating", done(rows, room=room)))
    [replica] = run.telemetry.picture().replicas
    assert replica.rows_per_s == pytest.approx(2, rel=0.05)
    assert replica.tokens_per_s == pytest.approx(60, rel=0.05)
    assert (replica.batch_rows, replica.tokens_per_forward) == (7.5, 3.0)
    assert replica.padding_share == pytest.approx(0.2)
    assert (replica.doing, replica.heard) == ("generating", run.clock.now)
    run.reporter.close("stopped")


def test_a_lost_replica_leaves_its_errors_and_its_units_count_as_retried(tmp_path: Path) -> None:
    run = Run(tmp_path)
    kinds = (ErrorCount("prompt is null", 2, "a#1: prompt is null"),)
    unit = one_piece("u5", "a", "a", 0, 10)
    run.hear(ReplicaReady("r0"), ReplicaReady("r1"))
    run.hear(UnitProgress("r0", ("u1", None), 5, 2, 50), UnitProgress("r0", ("u2", None), 0, 0, 0))
    run.hear(ReplicaActive("r0", 1, "x", done(5, errors=2, error_kinds=kinds)))
    run.hear(UnitDone(UnitResult("u1", Totals(rows=10, ok=10), 1.0, "", "r0", 1)))
    run.hear(ReplicaLost("r0", "killed"), UnitFailed("r1", Assignment(unit), "no such bucket"))
    run.hear(ReplicaActive("r1", 1, "x", done(5, errors=2, error_kinds=kinds)))
    picture = run.telemetry.picture()
    assert [(replica.name, replica.stats.error_kinds) for replica in picture.replicas] == [("r1", ())]
    assert (picture.replicas_lost, picture.losses) == (1, ("r0: killed",))
    assert picture.unit_retries == 2  # u2 of the lost replica, and u5, which failed
    assert [(count.kind, count.rows) for count in picture.error_kinds] == [("prompt is null", 4)]
    assert (picture.units, picture.rows) == (2, 10)
    run.reporter.close("stopped")


def test_the_file_is_written_without_the_loop_and_says_how_the_run_ended(tmp_path: Path) -> None:
    """The loop may stand still while a model loads. The driver is alive all the same, and `sampled` shows when the loop
    last went on."""
    run = Run(tmp_path)
    storage = Storage(str(tmp_path))
    first = wait_for(storage, lambda live: live.ended is None)
    later = wait_for(storage, lambda live: live.time > first.time)
    assert later.sampled == first.sampled == 1000.0
    run.reporter.close("no space left")
    live = read_live(storage, "ours")
    assert live is not None
    assert (live.ended, live.total_rows, live.total_units) == ("no space left", 100, 10)
    assert read_live(storage, "another job's") is None


def wait_for(storage: Storage, wanted: Any) -> Live:
    def look() -> Live | None:
        live = read_live(storage, "ours")
        return live if live is not None and wanted(live) else None

    live = wait_until(look, pause_s=0.01)
    assert live is not None
    return live


def test_where_another_driver_took_over_nothing_more_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    wait_for(Storage(str(tmp_path)), lambda _live: True)
    run.reporter.close(None)
    (tmp_path / LIVE).write_text("the newer driver's")
    run.file._thread.join(PATIENCE_S)
    assert not run.file._thread.is_alive()  # no thread is left that could write
    assert (tmp_path / LIVE).read_text() == "the newer driver's"


def test_storage_and_sinks_that_fail_cost_the_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    def broken(_live: Live) -> None:
        raise RuntimeError("no\nmetrics")

    monkeypatch.setattr(Storage, "write", refuse)
    run = Run(tmp_path, broken)
    run.clock.now += SAMPLE_S
    run.reporter.turn()
    run.reporter.close("complete")
    assert run.told == ["metrics are off from now on: RuntimeError: no metrics"]
    assert [picture.ended for picture in run.pictures] == [None, None, "complete"]
    assert not (tmp_path / LIVE).exists()


@pytest.mark.parametrize("text", ["", "null", "[]", '{"time": 1}', "\x00", '{"time": "\\ud800"}'])
def test_what_is_no_live_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "_job").mkdir()
    (tmp_path / LIVE).write_text(text)
    assert read_live(Storage(str(tmp_path)), "ours") is None


def test_a_picture_survives_its_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.hear(ReplicaReady("r0"), ReplicaActive("r0", 1, "x", done(1, room=EngineRoom(pages=7))))
    run.reporter.close("complete")
    live = read_live(Storage(str(tmp_path)), "ours")
    assert live is not None
    assert live.replicas == run.pictures[-1].replicas
    assert json.loads((tmp_path / LIVE).read_text())["replicas"][0]["stats"]["room"]["pages"] == 7
