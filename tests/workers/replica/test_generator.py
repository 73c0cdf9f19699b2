"""Tests of `preview` with the real model in one process."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from model import Request
from pipeline.cli.app import app
from pipeline.config.loader import load_job
from pipeline.monitoring.progress import LineDisplay
from pipeline.preview.run import generate_preview
from tests.pipeline.cases import write
from workers.replica.generator import ReplicaGenerator

pytestmark = pytest.mark.slow

JOB: dict[str, Any] = {
    "name": "small",
    "input": {
        "template": "What is {{ a }} + {{ b }}?\nAnswer:",
        "row_settings": {"temperature": "heat", "max_new_tokens": "most"},
    },
    "output": {"rows_per_file": 4},
    "model": {"checkpoint": "builtin:tiny", "dtype": "float32"},
    "generation": {"max_new_tokens": 24, "seed": 7},
    "engine": {"max_rows": 3, "max_context_tokens": 256},
    "workers": {"gpus": 0, "cpus": 1},
}
SAME = ("completion", "completion_tokens", "prompt_tokens", "finish_reason", "denoiser_forwards", "mean_confidence")


def test_its_completions_are_those_that_run_writes(tmp_path: Path) -> None:
    """Bit by bit, for greedy and sampled rows of two units. The preview leaves nothing behind."""
    columns: dict[str, Any] = {
        "a": [1, 23, None, 45, 67, 8],
        "b": [2, 46, 1, 38, 5, 9],
        "heat": [0.0, 1.5, 0, 1.5, 0, 2.0],
    }
    write(tmp_path / "in/a.parquet", **columns, most=[None, None, 8, 20, 4, None])
    job = {**JOB, "input": {**JOB["input"], "path": f"{tmp_path}/in"}}
    job["output"] = {**JOB["output"], "path": f"{tmp_path}/out"}
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(job))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shown = generate_preview(load_job(file), 5, ReplicaGenerator, LineDisplay(io.StringIO()), threading.Event())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    ran = CliRunner().invoke(app, ["run", str(file), "--local", "--set", "retry.max_error_rate=1"])
    assert ran.exit_code == 0, ran.output
    rows = {row["id"]: row for part in (tmp_path / "out").glob("part-*") for row in pq.read_table(part).to_pylist()}
    assert [each.row.key for each in shown.rows] == sorted(rows)
    assert [each.row.error for each in shown.rows] == [rows[key]["error"] for key in sorted(rows)]
    assert [shown.reason(each) is None for each in shown.rows] == [True, True, False, True, True, True]
    for key, done in shown.completions.items():
        found = done.text, len(done.token_ids), done.prompt_tokens, done.finish_reason, done.denoiser_forwards
        assert (*found, done.mean_confidence) == tuple(rows[key][name] for name in SAME)


def test_ar_loads_one_tower_and_a_refused_request_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["a"])
    file = tmp_path / "job.yaml"
    sections = {"input": {"path": f"{tmp_path}/in"}, "output": {"path": f"{tmp_path}/out"}}
    file.write_text(json.dumps({**JOB, **sections, "generation": {"mode": "ar", "max_new_tokens": 4}}))
    job = load_job(file, ["model.checkpoint=builtin:noise"])
    generator = ReplicaGenerator(job)
    ticks: list[tuple[int, int]] = []
    assert generator.start(lambda *counts: ticks.append(counts)).startswith("self-check passed")
    assert generator._engine is not None
    assert generator._engine.pair.denoiser is None
    params = job.generation.params(())
    asked = [Request("good", (5, 6), params), Request("bad", (10**6,), params)]
    good, bad = generator.generate(asked, lambda *counts: ticks.append(counts))
    generator.close()
    assert (good.key, len(good.token_ids), good.finish_reason) == ("good", 4, "length")
    assert (bad.key, bad.prompt_tokens, bad.finish_reason) == ("bad", 1, "error")
    assert "outside the vocabulary" in str(bad.error)
    assert (ticks[0], ticks[-1]) == ((0, 0), (1, 1))
