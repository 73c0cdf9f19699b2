"""What a replica makes of a job's engine section."""

from pathlib import Path

import pytest

from model.memory import AUTO_MAX_ROWS
from tests.workers.jobs import open_job, prompts_of
from workers import build


def test_a_replica_says_where_its_memory_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan stands in the replica's log, and its engine runs as many rows as the plan came to."""
    engine = {"max_rows": "auto", "max_context_tokens": 256}
    small = open_job(tmp_path, prompts_of(1), engine=engine, workers={"gpus": 0})
    runner = build.make_runner(small.spec, "r0")
    runner.close()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("r0: ") for line in lines)
    rows = AUTO_MAX_ROWS["cpu"]
    assert lines[-1] == f"r0: max_rows {rows}, kv_tokens {rows * 256:,}"
    assert runner._engine.max_rows == rows
