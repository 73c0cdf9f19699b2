"""Tests of the command preview without a model: its text, its exit codes, and that it writes nothing."""

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import pipeline.cli.compose
from model.requests import Completion, Request
from pipeline.calibration.bench import Tick
from pipeline.cli.app import app
from pipeline.core.errors import ClusterError
from tests.pipeline.cases import write

JOB = """
name: small
input: {{path: {folder}/in, id_column: id, special_tokens: all, row_settings: {{max_new_tokens: n}}}}
output: {{path: {folder}/out}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation: {{max_new_tokens: 8, on_degenerate: retry}}
workers: {{gpus: 0}}
"""
PROMPTS = ["One\nline: \x1b[2J", None, "<eos>two <eos>", "fails", "loops", "never shown"]


class FakeGenerator:
    """A generator whose completions are an escape sequence and long words, a loop, or an error, as the id says."""

    def __init__(self, during: Any = None, failure: Exception | None = None) -> None:
        self.during, self.failure, self.closed, self.requests = during, failure, False, list[Request]()

    def start(self, tick: Tick) -> str:
        tick(0, 0)
        return "self-check passed"

    def generate(self, requests: Sequence[Request], tick: Tick) -> Sequence[Completion]:
        self.requests = list(requests)
        if self.failure:
            raise self.failure
        if self.during:
            self.during()
        tick(1, len(requests))
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        base: dict[str, Any] = {"key": request.key, "prompt_tokens": len(request.prompt_ids)}
        if request.key.endswith("#3"):
            return Completion(**base, finish_reason="error", error="token id 9999 is outside the vocabulary of 512")
        loops = request.key.endswith("#4")
        ids = (7,) * 40 if loops else (1, 2, 3, 4, 5)
        text = "ha" * 40 if loops else " \x1b]0;owned\x07 a\\b\n\tindented " + "日本" * 40
        return Completion(**base, token_ids=ids, text=text, finish_reason="stop", denoiser_forwards=2, latency_s=0.5)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TWOTOWER_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path / "in/a.parquet", prompt=PROMPTS, id=[f"k{i}" for i in range(6)], n=[5, *[None] * 5])
    file = tmp_path / "small job.yaml"
    file.write_text(JOB.format(folder=tmp_path))
    return file


def call(job: Path, generator: FakeGenerator, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    def make(_local: bool, signals: Any, _job: Any) -> FakeGenerator:
        signals.install()
        return generator

    monkeypatch.setattr(pipeline.cli.compose, "make_generator", make)
    return CliRunner().invoke(app, ["preview", str(job), *arguments])


def test_it_shows_prompts_completions_and_statistics_and_writes_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in job.parent.rglob("*")}
    generator = FakeGenerator()
    done = call(job, generator, monkeypatch, "--rows", "4", "--local", "--set", "generation.seed=3")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"job small: the first rows of {job.parent}/in, mode diffusion",
        f"{'── row a.parquet#0, id k0 ':─<80}",
        f"prompt     {len(generator.requests[0].prompt_ids)} tokens, 14 characters",
        "  One⏎",
        r"  line: \x1b[2J",
        "settings   max_new_tokens 5 (column n)",
        "completion stop; 5 tokens in 2 denoiser forwards (2.50 per forward), 0.50 s",
        r"   \x1b]0;owned\x07 a\b",
        "      indented ",
        "  " + "日本" * 19 + "日",
        "  本" + "日本" * 19,
        "  日本",
        f"{'── row a.parquet#1, id k1 ':─<80}",
        "error      prompt is null",
        f"{'── row a.parquet#2, id k2 ':─<80}",
        f"prompt     {len(generator.requests[1].prompt_ids)} tokens, 14 characters",
        "  <eos>two <eos>",
        "control    <eos> x 2",
        "completion stop; 5 tokens in 2 denoiser forwards (2.50 per forward), 0.50 s",
        *done.stdout.splitlines()[7:12],
        f"{'── row a.parquet#3, id k3 ':─<80}",
        "error      token id 9999 is outside the vocabulary of 512",
        f"{'── row a.parquet#4, id k4 ':─<80}",
        f"prompt     {len(generator.requests[3].prompt_ids)} tokens, 5 characters",
        "  loops",
        "completion stop; 40 tokens in 2 denoiser forwards (20.00 per forward), 0.50 s",
        "  " + "ha" * 39,
        "  ha",
        "loop       100% of the completion repeats itself; `run` would generate it again",
        "           with more careful settings",
        "─" * 80,
        "generated  3 rows: 50 tokens in 6 denoiser forwards (8.33 per forward)",
        "error rows 2 of the first 5 rows: 1 x prompt is null; 1 x token id 9999 is",
        "           outside the vocabulary of 512",
        "           more than retry.max_error_rate 0.1 allows: `run` may end with an",
        "           error",
        "written    nothing",
        f"next       twotower run '{job}' --set generation.seed=3 --local",
    ]
    assert done.stderr.splitlines() == ["loading builtin:noise", "self-check passed", "generating 4 rows"]
    assert {request.params.seed for request in generator.requests} == {3}
    assert generator.closed
    assert {path: path.stat().st_mtime_ns for path in job.parent.rglob("*")} == before


def test_a_long_prompt_is_shortened_in_the_middle_unless_all_of_it_is_asked_for(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(job.parent / "in/a.parquet", prompt=["begin " + "word " * 1000 + "end", "p"], id=[None, "b"], n=[None, 1])
    short, whole = (call(job, FakeGenerator(), monkeypatch, *more).stdout for more in ((), ("--full",)))
    assert "── row a.parquet#0, id null ─" in short
    assert len(short) < 2500 < 5000 < len(whole)
    for text in (short, whole):
        assert re.search(r"\n  begin word .*word end\n", text, re.DOTALL)
    assert (" … " in short, " … " in whole) == (True, False)


def test_without_a_row_to_generate_no_replica_is_made(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 1, and of many such rows one is shown."""
    write(job.parent / "in/a.parquet", prompt=[None, None, ""], id=["a"] * 3, n=[1] * 3)
    monkeypatch.setattr(pipeline.cli.compose, "make_generator", lambda *_: pytest.fail("a replica was made"))
    done = CliRunner().invoke(app, ["preview", str(job)])
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: input {job.parent}/in: none of the first 3 rows can be generated: 2 x prompt is null; "
        "1 x prompt is empty\n"
    )
    assert done.stdout.count("── row") == 1


@pytest.mark.parametrize("output", ["a file", "another job's"])
def test_the_output_is_no_obstacle(job: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """What is at output.path stays as it is: here a file, or a folder that `run` refuses."""
    if output == "a file":
        (job.parent / "out").write_text("x")
    else:
        write(job.parent / "out/part-x.parquet", a=[1])
        (job.parent / "out/_job").mkdir()
        (job.parent / "out/_job/plan.json").write_text('{"other": 1}')
    before = {path: path.stat().st_mtime_ns for path in job.parent.rglob("*")}
    done = call(job, FakeGenerator(), monkeypatch)
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in job.parent.rglob("*")} == before


def test_a_signal_and_a_failure_are_one_line(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = FakeGenerator(during=lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = call(job, stopped, monkeypatch)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (143, "stopped; nothing was written")
    assert stopped.closed
    assert not done.stdout
    failed = FakeGenerator(failure=ClusterError("no node has room"))
    done = call(job, failed, monkeypatch)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "error: no node has room")
    assert failed.closed
    assert call(job, failed, monkeypatch, "--rows", "101").exit_code == 2
