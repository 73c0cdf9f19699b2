"""Tests of the JSON logs: a run writes the expected records and fields, and no prompt is among them."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.cli.compose
from pipeline.core.events import ReplicaLost, UnitFailed
from pipeline.core.types import Assignment
from pipeline.monitoring.logs import LOG, event_record, is_json
from tests.pipeline.cases import one_piece
from tests.pipeline.cli.test_app import JOB, call, fake_pool
from workers.replica.local_pool import LocalPool


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, LocalPool))
    handlers, level = list(LOG.handlers), LOG.level
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": [f"secret {i}" for i in range(25)]}), tmp_path / "in" / "a.parquet")
    file = tmp_path / "small.yaml"
    file.write_text(JOB.format(folder=tmp_path))
    yield file
    LOG.handlers[:] = handlers
    LOG.setLevel(level)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_leaves_records_of_units_with_their_fields_and_no_prompt(job: Path) -> None:
    result = call("run", job, "--log-format", "json")
    assert result.exit_code == 0
    found = records(result.stderr)  # each line is a record
    assert "secret" not in result.stderr
    assert all({"ts", "level", "event", "source"} <= record.keys() for record in found)
    begun = [record for record in found if record["event"] == "unit begun"]
    assert {(record["source"], record["replica"], record["attempt"]) for record in begun} == {("replica", "local-1", 1)}
    assert (len(begun), sum(record["rows"] for record in begun)) == (3, 25)
    of_driver = [record for record in found if record["event"] == "unit done" and record["source"] == "driver"]
    assert sum(record["rows"] for record in of_driver) == 25
    assert {record["unit"] for record in of_driver} == {record["unit"] for record in begun}
    assert found[-1]["event"] == "progress"
    assert (found[-1]["rows"], found[-1]["total_rows"]) == (25, 25)


def test_text_is_the_default_and_the_environment_can_choose(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "25/25 rows" in call("run", job).stderr
    assert not is_json()
    monkeypatch.setenv("TWOTOWER_LOG", "json")
    out = job.parent / "out2"
    assert records(call("run", job, "--set", f"output.path={out}").stderr)
    assert is_json()


def test_reasons_are_logged_without_what_they_quote() -> None:
    work = Assignment(one_piece("u1", "a", "a", 0, 10), attempt=2, rows=(3, 5))
    record = event_record(UnitFailed("r0", work, "cannot decode 'secret'"))
    assert record is not None
    fields = {"replica": "r0", "unit": "u1", "attempt": 2, "range": (3, 5), "reason": "cannot decode '…'"}
    assert record[1:] == ("unit failed", fields)
    lost = event_record(ReplicaLost("r0", 'ValueError: "secret"', excused=True))
    assert lost is not None
    assert lost[2]["reason"] == "ValueError: '…'"
