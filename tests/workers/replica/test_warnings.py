"""Tests that a warning reaches the operator, the manifest, `status` and the summary, even if a driver dies."""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import pipeline.cli.compose
from model.requests import Completion
from pipeline.cli.app import app
from pipeline.planning.plan import Plan
from tests.workers.fakes import FakeEngine, FakeMaker
from tests.workers.jobs import prompts_of, write_prompts
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool
from workers.units.runner import UnitRunner

JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out, rows_per_file: 50}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
workers: {{gpus: 0}}
"""
FIRST = "its first 200 blocks took one denoiser forward per token"


class OneByOne(FakeEngine):
    """An engine that commits one token per step, as with a wrong scan."""

    def step(self) -> list[Completion]:
        done = super().step()
        return [
            Completion(
                key=each.key,
                token_ids=(5,) * 32,
                text=each.text,
                finish_reason=each.finish_reason,
                denoiser_forwards=32,
                steps_per_block=(16, 16),
            )
            for each in done
        ]


class SlowMaker(FakeMaker):
    def __call__(self, replica: str) -> UnitRunner:
        runner = super().__call__(replica)
        runner._engine = OneByOne()
        return runner


def slow_pool(job: Any, _local: bool, signals: Any, plan: Plan, *_: Any, **_named: Any) -> LocalPool:
    signals.install()
    return LocalPool(SlowMaker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "functools.partial[Result]":
    write_prompts(tmp_path / "in" / "a.parquet", prompts_of(150))
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path))
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", slow_pool)
    return functools.partial(CliRunner().invoke, app, ["run", str(tmp_path / "job.yaml")])


def test_a_warning_is_told_listed_and_shown(run: "functools.partial[Result]", tmp_path: Path) -> None:
    done = run()
    assert done.exit_code == 0, done.output
    assert done.stderr.count(f"local-1: warning: {FIRST}") == 1
    manifest = json.loads((tmp_path / "out/_job/manifest.json").read_text())
    [warning] = manifest["warnings"]
    assert warning.startswith(f"replica local-1: {FIRST}")
    assert f"\nwarning  {warning}\n" in done.stdout
    again = run()
    assert "was complete already" in again.stdout
    assert f"\nwarning  {warning}\n" in again.stdout
    status = CliRunner().invoke(app, ["status", str(tmp_path / "out")])
    assert f"\nwarning  {warning}\n" in status.stdout
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert verified.exit_code == 0, verified.output


@pytest.mark.slow
def test_a_driver_that_died_before_the_end_takes_no_warning_with_it(
    run: "functools.partial[Result]", tmp_path: Path
) -> None:
    """The next driver reads it from the parts."""
    run()
    for name in ("_SUCCESS", "_job/manifest.json"):
        (tmp_path / "out" / name).unlink()
    done = run()
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out/_job/manifest.json").read_text())
    [warning] = manifest["warnings"]
    assert warning.startswith("replica local-1: 4,800 tokens took 4,800 denoiser forwards, so block diffusion gains")
    assert f"\nwarning  {warning}\n" in done.stdout


def test_a_manifest_of_an_earlier_version_is_read(run: "functools.partial[Result]", tmp_path: Path) -> None:
    """It has no warnings. A complete job stays complete."""
    run()
    file = tmp_path / "out/_job/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["warnings"]
    file.write_text(json.dumps(manifest))
    words = Counter(run().stdout.split() + CliRunner().invoke(app, ["status", str(tmp_path / "out")]).stdout.split())
    assert words["warning"] == 0
    assert words["complete"] == 3  # twice from `status`: the state, and since when
