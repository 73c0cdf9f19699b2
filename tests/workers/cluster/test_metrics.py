"""Tests of the metrics of a run, without Ray: counters go on after a replica is lost, and its gauges end with it."""

import sys
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.error_kinds import ErrorCount
from pipeline.core.events import EngineRoom, ReplicaStats
from pipeline.monitoring.live import Live, LiveReplica
from workers.cluster.metrics import COUNTERS, GAUGES, RayMetrics, _counts, _gauges


class Metric:
    """A fake of Ray's Counter or Gauge that keeps its values by tags."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def inc(self, more: float, tags: dict[str, str]) -> None:
        assert more > 0
        self.set(self.values.get(_label(tags), 0.0) + more, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags["job_name"] == "j"
        self.values[_label(tags)] = value


def _label(tags: dict[str, str]) -> str:
    return tags.get("replica") or tags.get("kind") or "-"


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> RayMetrics:
    class Connected:
        @staticmethod
        def is_initialized() -> bool:
            return True

    monkeypatch.setitem(sys.modules, "ray", Connected)
    made = RayMetrics("j")
    made._metrics = {name: Metric() for name in (*COUNTERS, *GAUGES)}
    return made


def live(*replicas: LiveReplica, **more: Any) -> Live:
    counts = {"rows": 5, "total_rows": 9, "errors": 1, "units": 1, "total_units": 3}
    settings = {"replicas_lost": 0, "losses": (), "unit_retries": 0, "error_kinds": (), "eta_s": None, **more}
    given: dict[str, Any] = {**counts, "rows_per_s": 1.0, "tokens_per_s": 2.0, **settings}
    return Live(time=0, sampled=10, fingerprint="", started=0, ended=None, replicas=replicas, **given)


def replica(name: str, stats: ReplicaStats) -> LiveReplica:
    means = {"batch_rows": 3.0, "tokens_per_forward": 2.5, "padding_share": 0.1}
    return LiveReplica(name=name, doing="", heard=4, rows_per_s=1.0, tokens_per_s=2.0, stats=stats, **means)


def values(metrics: RayMetrics, name: str) -> dict[str, float]:
    found: dict[str, float] = metrics._metrics[f"twotower_{name}"].values
    return found


def test_every_metric_of_the_tables_has_a_value_with_its_labels() -> None:
    shown = live(replica("r0", ReplicaStats()), error_kinds=(ErrorCount("too long", 1, ""),))
    keys = [key for counts in _counts(shown).values() for key in counts] + [key for key, _ in _gauges(shown)]
    tables = {**COUNTERS, **GAUGES}
    assert {name for name, _ in keys} == tables.keys()
    assert all(bool(label) == bool(tables[name][1]) for name, label in keys)
    assert all(text and len(labels) <= 1 for text, labels in tables.values())
    assert all(name.startswith("twotower_") and name.endswith("_total") == (name in COUNTERS) for name in tables)


def test_counters_go_on_where_a_replica_is_replaced(metrics: RayMetrics) -> None:
    first = ReplicaStats(rows=10, storage_retries=2, room=EngineRoom(padded_tokens=50))
    metrics(live(replica("r0", first), replica("r1", first)))
    metrics(live(replica("r0", replace(first, rows=25)), replica("r1", first)))
    metrics(live(replica("r1", first), replicas_lost=1, unit_retries=2))
    metrics(live(replica("r1", first), replica("r0.2", replace(first, rows=4)), replicas_lost=1, unit_retries=2))
    assert values(metrics, "rows_total") == {"r0": 29, "r1": 10}
    assert values(metrics, "prefill_padded_tokens_total") == {"r0": 100, "r1": 50}
    assert values(metrics, "retries_total") == {"storage": 6, "unit": 2}
    assert values(metrics, "replicas_lost_total") == {"-": 1}


def test_gauges_of_a_replica_that_is_gone_are_zero(metrics: RayMetrics) -> None:
    stats = ReplicaStats(queue=3, active=2, unsaved_s=9, room=EngineRoom(slots_used=2, slots=10, pages_used=5, pages=8))
    metrics(live(replica("r0", stats), replica("r1", stats)))
    assert values(metrics, "queue_rows") == {"r0": 3, "r1": 3}
    assert values(metrics, "report_age_seconds") == {"r0": 6, "r1": 6}
    metrics(live(replica("r1", stats), eta_s=12.0))
    assert values(metrics, "queue_rows") == {"r0": 0, "r1": 3}
    assert values(metrics, "checkpoint_age_seconds") == {"r0": 0, "r1": 9}
    assert values(metrics, "job_eta_seconds") == {"-": 12}


def test_errors_are_counted_by_kind(metrics: RayMetrics) -> None:
    metrics(live(error_kinds=(ErrorCount("prompt is null", 2, ""),)))
    metrics(live(error_kinds=(ErrorCount("prompt is null", 5, ""), ErrorCount("too long", 1, ""))))
    assert values(metrics, "error_rows_total") == {"prompt is null": 5, "too long": 1}


def test_nothing_is_set_where_ray_is_not_connected(metrics: RayMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray")
    metrics(live(replica("r0", ReplicaStats(rows=1))))
    assert values(metrics, "rows_total") == {}
