"""Tests of the command line without Ray and torch: its output and its exit codes."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import pipeline.cli.compose
import pipeline.cli.signals
from pipeline.cli.app import app
from pipeline.config.job import FlushSection
from pipeline.config.loader import load_job
from pipeline.core.errors import ClusterError
from pipeline.core.events import Event
from pipeline.planning.plan import Plan
from tests.waiting import PATIENCE_S
from tests.workers.fakes import FakeMaker
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool

JOB = """
name: small
input: {{path: {folder}/in}}
output: {{path: {folder}/out, rows_per_file: 10}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation: {{max_new_tokens: 8}}
workers: {{gpus: 0}}
"""


class TerminatedPool(LocalPool):
    """A pool that sends SIGTERM to its own process when the first unit is done."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        events = super().wait(timeout_s)
        if any(type(event).__name__ == "UnitDone" for event in events):
            os.kill(os.getpid(), signal.SIGTERM)
        return events


class HalfDonePool(LocalPool):
    """A pool that sends SIGTERM to its own process when one unit has its part and another one, far from its end, has
    segments."""

    killed = False

    def wait(self, timeout_s: float) -> Sequence[Event]:
        events = super().wait(timeout_s)
        assert isinstance(self._make_runner, FakeMaker)
        out = Path(self._make_runner.spec.job.output.path)
        done = {part.stem.removeprefix("part-") for part in out.glob("part-*")}
        if done and not self.killed and 0 < len(list_segments(out, but=done)) <= 5:  # each has at least one row
            self.killed = True
            os.kill(os.getpid(), signal.SIGTERM)
        return events


def list_segments(out: Path, but: Container[str] = ()) -> list[Path]:
    """List the segments, except those of the units in `but`."""
    return [file for file in out.glob("_job/segments/*/*.parquet") if file.parent.name not in but]


def fake_pool(
    pool_class: type[LocalPool],
    job: Any,
    _local: bool,
    signals: Any,
    plan: Plan,
    *_: Any,
    json_logs: bool,
    step_s: float = 0.0,
) -> LocalPool:
    pool = pool_class(
        FakeMaker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts, json_logs), step_s=step_s)
    )
    signals.install()
    return pool


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, LocalPool))
    monkeypatch.delenv("TWOTOWER_DEBUG", raising=False)
    (tmp_path / "in").mkdir()
    prompts = ["a" * (1 + i % 40) for i in range(34)] + [None]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    file = tmp_path / "small.yaml"
    file.write_text(JOB.format(folder=tmp_path))
    return file


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_run_ends_with_a_summary_and_a_second_run_does_nothing(job: Path) -> None:
    out = job.parent / "out"
    first = call("run", job)
    assert first.exit_code == 0, first.output
    assert "job small is complete: 35 rows: 34 ok, 1 error\n" in first.stdout
    assert f"output   {out}" in first.stdout
    assert f"manifest {out}/_job/manifest.json" in first.stdout
    assert f"report   {out}/_job/report.html" in first.stdout
    assert "35 rows, 34 ok, 1 error." in (out / "_job/report.html").read_text()
    assert f"FROM '{out}/part-*.parquet' GROUP BY 1" in first.stdout
    assert "35/35 rows (100.0%)" in first.stderr
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = call("run", job)
    assert second.exit_code == 0
    assert "job small was complete already, nothing was run: 35 rows: 34 ok, 1 error\n" in second.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.slow
def test_a_missing_part_or_manifest_is_made_again(job: Path) -> None:
    call("run", job)
    out = job.parent / "out"
    next(out.glob("part-*.parquet")).unlink()
    assert "(3 of 4 units done before)" in call("run", job).stdout
    (out / "_SUCCESS").unlink()
    assert "its manifest was missing" in call("run", job).stdout
    assert (out / "_SUCCESS").exists()
    (out / "_job/manifest.json").write_text("{")
    assert "complete without a manifest: submit the same job again" in call("status", out).stdout
    assert call("plan", job).exit_code == 0
    assert "its manifest was missing" in call("run", job).stdout
    assert "was complete already" in call("run", job).stdout


def test_success_is_gone_while_a_lost_part_is_made_again(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("run", job)
    out = job.parent / "out"
    next(out.glob("part-*.parquet")).unlink()
    assert "not complete" in call("status", out).stdout

    def unavailable(*_: Any, **_named: Any) -> LocalPool:
        raise ClusterError("no cluster")

    monkeypatch.setattr(pipeline.cli.compose, "make_pool", unavailable)
    failed = call("run", job)
    assert (failed.exit_code, failed.stderr.splitlines()[-1]) == (1, "error: no cluster")
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--set", "generation.block_size=0"], "block_size"),
        (["--set", "input.prompt_column=text"], "column 'text'"),
        (["--set", "model.checkpoint=/nowhere"], "/nowhere"),
        (["--set", "workerz.gpus=1"], "workerz"),
        (["--set", "input.path=/nowhere/*.parquet"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(job: Path, arguments: list[str], text: str) -> None:
    before = files_of(job.parent)
    result = call("run", job, *arguments)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert text in line
    assert files_of(job.parent) == before


def test_another_jobs_output_is_refused(job: Path) -> None:
    call("run", job)
    for command in ("run", "plan"):
        result = call(command, job, "--set", "generation.seed=2")
        assert result.exit_code == 1
        assert "belongs to another job; what differs (there -> here): generation.seed: 0 -> 2" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["file", "foreign part", "extra part", "truncated part"])
def test_plan_refuses_what_run_refuses_with_the_same_words(job: Path, damage: str) -> None:
    out = job.parent / "out"
    if damage == "file":
        out.write_text("x")
    else:
        call("run", job)
        part = next(out.glob("part-*.parquet"))
        if damage == "foreign part":
            part.write_bytes((job.parent / "in/a.parquet").read_bytes())
        elif damage == "extra part":
            (out / "part-x.parquet").write_bytes(part.read_bytes())
        else:
            part.write_bytes(part.read_bytes()[:-9])
    before = files_of(job.parent)
    planned, ran = call("plan", job), call("run", job)
    assert planned.exit_code == 1
    assert planned.stderr == ran.stderr
    assert files_of(job.parent) == before


def test_a_lost_plan_is_made_again_by_run_and_not_by_plan(job: Path) -> None:
    call("run", job)
    plan = job.parent / "out/_job/plan.json"
    plan.unlink()
    before = files_of(job.parent)
    assert call("plan", job).exit_code == 0
    assert files_of(job.parent) == before
    assert call("run", job).exit_code == 0
    assert plan.exists()


def test_a_context_without_room_for_any_prompt_is_named(job: Path) -> None:
    result = call("run", job, "--set", "engine.kv_tokens=8")
    assert result.exit_code == 1
    assert "generation.max_new_tokens is 8, and prompt and completion together may have 8 tokens" in result.stderr
    assert "raise engine.kv_tokens" in result.stderr
    assert "kv_tokens" not in call("run", job, "--set", "generation.max_new_tokens=1000000").stderr
    too_long = call("run", job, "--set", "engine.max_context_tokens=1000000").stderr
    assert too_long.startswith("error: engine.max_context_tokens is 1000000, but the checkpoint's contexts hold ")
    assert call("run", job, "--set", "engine.kv_tokens=100").exit_code == 0


def test_too_many_error_rows_fail_the_job_and_raising_the_limit_completes_it(job: Path) -> None:
    result = call("run", job, "--set", "retry.max_error_rate=0.01")
    assert result.exit_code == 1
    assert "1 of 35 rows are error rows (2.9%), above retry.max_error_rate (1.0%)" in result.stderr.splitlines()[-1]
    assert not (job.parent / "out" / "_SUCCESS").exists()
    assert call("run", job).exit_code == 0


def test_debug_shows_the_traceback(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("run", job, "--set", "x=1", "--debug").exception is not None
    monkeypatch.setenv("TWOTOWER_DEBUG", "1")
    assert type(call("run", job, "--set", "x=1").exception).__name__ == "JobError"


def test_wrong_usage_exits_with_2(job: Path) -> None:
    assert call("run").exit_code == 2
    assert call("walk", job).exit_code == 2
    assert call("run", job, "--fast").exit_code == 2


@pytest.mark.parametrize("command", ["status", "report", "verify", "clean"])
def test_an_empty_output_is_not_the_current_directory(job: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """The argument is empty, as from a shell variable that is not set, and the current directory is an output
    folder."""
    assert call("run", job).exit_code == 0
    monkeypatch.chdir(job.parent / "out")
    result = call(command, "")
    assert result.exit_code == 2
    assert "it is empty: give the output folder of a job" in result.output


def test_sigterm_stops_with_143_and_the_next_run_resumes(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, TerminatedPool))
    stopped = call("run", job)
    assert stopped.exit_code == 143
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith("stopped; ")
    assert last.endswith(" of 4 units are done; submit the same job again to resume")
    assert signal.getsignal(signal.SIGTERM) is before
    status = call("status", job.parent / "out")
    assert status.exit_code == 0
    assert "submit the same job again to resume" in status.stdout
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, LocalPool))
    assert "units done before)" in call("run", job).stdout


def as_of_the_version_before(job: Path) -> None:
    """Change the job file and plan.json to the form of the version before, in which the section `flush` was named
    `checkpoint`."""
    file = job.parent / "out/_job/plan.json"
    plan = json.loads(file.read_text())
    plan["job"] = {"checkpoint" if key == "flush" else key: value for key, value in plan["job"].items()}
    file.write_text(json.dumps(plan))
    job.write_text(job.read_text().replace("\nflush:", "\ncheckpoint:"))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["checkpoint", "flush"])
def test_an_output_begun_by_an_older_version_is_read_and_resumed(
    job: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The job is half done: it has a part with an error row, and segments. Its job file has the old or the new name of
    the section. No finished row is generated again, and plan.json stays as it is."""
    prompts = [None if i % 8 == 5 else "a" * (1 + i % 40) for i in range(35)]  # each of the first 3 units has one
    pq.write_table(pa.table({"prompt": prompts}), job.parent / "in" / "a.parquet")
    job.write_text(f"{job.read_text()}retry: {{max_error_rate: 0.5}}\nflush: {{rows: 1}}\n")
    half = functools.partial(fake_pool, HalfDonePool, step_s=0.05)
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", half)
    assert call("run", job).exit_code == 143
    as_of_the_version_before(job)
    job.write_text(re.sub(r"\n(checkpoint|flush):", f"\n{key}:", job.read_text()))
    out, begun = job.parent / "out", (job.parent / "out/_job/plan.json").read_bytes()
    finished = {part: part.read_bytes() for part in out.glob("part-*")}
    assert 1 <= len(finished) < 4
    assert list_segments(out)

    status = call("status", out)
    assert (status.exit_code, status.stderr) == (0, "")
    assert f"units    {len(finished)} of 4" in status.stdout
    assert call("report", out, "--terminal").exit_code == 0
    assert call("report", out).exit_code == 0
    page = (out / "_job/report.html").read_text()
    assert re.search(r">flush\.rows<.{0,40}>1<", page, re.DOTALL)
    assert "checkpoint.rows" not in page
    assert "not complete" in call("verify", out).stdout
    made = call("retry-errors", out, "--to", job.parent / "again")
    assert made.exit_code == 0, made.output
    again = load_job(job.parent / "again/job.yaml")
    assert again.flush == FlushSection(rows=1)
    assert f"done       {len(finished)} unit" in call("plan", job).stdout

    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, LocalPool))
    resumed = call("run", job, "--set", "checkpoint.seconds=9")
    assert resumed.exit_code == 0, resumed.output
    assert f"({len(finished)} of 4 units done before)" in resumed.stdout
    assert "rows finished by earlier attempts" in resumed.stderr
    assert {part: part.read_bytes() for part in finished} == finished
    assert (out / "_job/plan.json").read_bytes() == begun
    assert json.loads((out / "_job/manifest.json").read_text())["job"]["flush"] == {"seconds": 9.0, "rows": 1}
    assert "rows     35 of 35 (31 ok, 4 errors)" in call("status", out).stdout
    assert call("verify", out).stdout.startswith("verified: 35 rows in 4 parts (")
    assert "was complete already" in call("run", job).stdout
    assert call("retry-errors", out, "--to", job.parent / "again2").exit_code == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "raise the pids limit of the container"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "raise the pids limit of the container"),
        (MemoryError(), "give the container or the node more memory"),
        (OSError(12, "Cannot allocate memory"), "give the container or the node more memory"),
    ],
)
def test_a_limit_of_the_machine_is_one_line_that_says_what_helps(
    job: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline.cli.compose, "make_pool", refused)
    result = call("run", job)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {type(error).__name__}")
    assert said in last
    assert "Traceback" not in result.output
    with pytest.raises(type(error)):
        CliRunner().invoke(app, ["run", str(job), "--debug"], catch_exceptions=False)


def test_bugs_keep_their_traceback(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline.cli.compose, "make_pool", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        CliRunner().invoke(app, ["run", str(job)], catch_exceptions=False)


def test_handlers_installed_twice_give_the_first_ones_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pipeline.cli.signals.StopSignals() as signals:
        signals.install()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ray.init() installs its own handler like this
        signals.install()
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_status_of_a_complete_job_and_of_no_job(job: Path) -> None:
    call("run", job)
    status = call("status", job.parent / "out")
    assert "rows     35 of 35 (34 ok, 1 error)" in status.stdout
    assert "units    4 of 4" in status.stdout
    assert "1 error, 34 length" in status.stdout
    assert "complete 20" in status.stdout
    nothing = call("status", job.parent / "in")
    assert nothing.exit_code == 1
    assert nothing.stderr.startswith("error: output ")


def test_plan_tells_what_would_run_and_writes_nothing(job: Path) -> None:
    before = files_of(job.parent)
    result = call("plan", job)
    assert result.exit_code == 0, result.output
    assert "1 file, 35 rows" in result.stdout
    assert "left: 35 rows" in result.stdout
    assert re.search(r"^prompts    [\d,]+ tokens$", result.stdout, re.MULTILINE)  # all rows were read
    assert "1 of 35 sampled rows have no usable prompt" in result.stdout
    assert "at most 280 tokens left (8 per row)" in result.stdout
    assert files_of(job.parent) == before
    call("run", job)
    assert "done       4 units, 35 rows; left: 0 rows" in call("plan", job).stdout


def test_plan_counts_tokens_by_the_rows_own_settings(job: Path) -> None:
    """Rows that would become error rows are not counted: those whose limit is below 1, or more than any context can
    hold."""
    columns = {"prompt": ["p"] * 6, "n": [100, 50, None, 2**31 - 1, 0, 2], "t": [0.5] * 6}
    pq.write_table(pa.table(columns), job.parent / "in" / "a.parquet")
    options = ["input.row_settings={max_new_tokens: n, temperature: t}", "generation.on_degenerate=retry"]
    options.append("retry.max_error_rate=0.5")
    result = call("plan", job, *(word for option in options for word in ("--set", option)))
    assert result.exit_code == 0, result.output
    assert "2 of 6 sampled rows have no usable prompt and settings" in result.stdout
    assert "per row    max_new_tokens from n, temperature from t; if null, the job's\n" in result.stdout
    said = "completion at most about 160 tokens left (by column n, estimate from the same sample), mode diffusion"
    assert f"{said}, again if degenerate\n" in result.stdout


def add_file(job: Path, name: str, rows: int) -> None:
    pq.write_table(pa.table({"prompt": [f"new {i}" for i in range(rows)]}), job.parent / "in" / name)


@pytest.mark.slow
def test_added_files_are_named_and_taken_with_extend(job: Path) -> None:
    call("run", job)
    add_file(job, "b.parquet", 12)
    for command in ("run", "plan"):
        refused = call(command, job)
        assert refused.exit_code == 1
        assert "planned over other input files: b.parquet is new; set input.on_change: extend to add" in refused.stderr
    extend = ("--set", "input.on_change=extend")
    planned = call("plan", job, *extend)
    assert "added      1 file, 12 rows since the last run: b.parquet" in planned.stdout
    assert "done       4 units, 35 rows; left: 12 rows" in planned.stdout
    assert "(4 of 6 units done before)" in call("run", job, *extend).stdout
    assert "rows     47 of 47" in call("status", job.parent / "out").stdout
    assert "\nadded " not in call("plan", job, *extend).stdout
    assert "was complete already" in call("run", job).stdout


def test_verify_says_that_all_is_well_or_lists_what_is_not(job: Path) -> None:
    call("run", job)
    out = job.parent / "out"
    good = call("verify", out)
    assert (good.exit_code, good.stderr) == (0, "")
    assert good.stdout.startswith("verified: 35 rows in 4 parts (")
    part = next(out.glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    (out / "notes.txt").write_text("x")
    bad = call("verify", out)
    assert bad.exit_code == 1
    assert [line.split(" ")[0] for line in bad.stdout.splitlines()] == [part.name, "notes.txt"]
    assert bad.stderr == "error: 1 problem and 1 leftover file found, 4 parts checked\n"
    none = call("verify", job.parent / "in")
    assert none.stderr.startswith("error: output ")
    part.unlink()
    (out / "notes.txt").unlink()
    call("run", job)
    assert call("verify", out).exit_code == 0


def test_verify_groups_foreign_files_and_tells_leftovers_from_wrong_rows(job: Path) -> None:
    """Foreign files alone have exit code 3; the summary counts them, and ten of them are named. A missing part among
    them has exit code 1."""
    call("run", job)
    out = job.parent / "out"
    (out / "data").mkdir()
    for number in range(1002):
        (out / f"data/{number:04}.csv").touch()
    (out / "data/x\x1b[2J.csv").touch()
    left = call("verify", out)
    assert left.exit_code == 3
    *named, more, summary = left.stdout.splitlines()
    assert len(named) == 10
    assert named[0].startswith("data/0000.csv is not from this project: move it away")
    assert more == "… and 993 more like these"
    assert summary.startswith("verified: 35 rows in 4 parts (")
    assert left.stderr == "1,003 leftover files found, and nothing wrong with the rows: the exit code is 3\n"
    every = call("verify", out, "--all").stdout
    assert len(every.splitlines()) == 1004
    assert "data/x?[2J.csv is" in every  # a terminal would obey the name
    for part in out.glob("part-*"):
        part.unlink()
    bad = call("verify", out)
    assert bad.exit_code == 1
    assert bad.stderr == "error: 1 problem and 1,003 leftover files found, 0 parts checked\n"


def test_verify_groups_damaged_parts(job: Path) -> None:
    """The rows that are missing are named beside the parts that are damaged, however many there are."""
    assert call("run", job, "--set", "output.rows_per_file=2").exit_code == 0
    out = job.parent / "out"
    for part in out.glob("part-*"):
        part.write_bytes(part.read_bytes()[:-9])
    (out / "_SUCCESS").unlink()
    bad = call("verify", out)
    assert bad.exit_code == 1
    *named, more = bad.stdout.splitlines()
    assert len(named) == 10
    assert all("is truncated, damaged or no part" in line for line in named)
    assert more == "… and 8 more like these"
    assert bad.stderr == "error: 18 problems found, 18 parts checked\n"


def test_retry_errors_makes_a_job_that_runs(job: Path) -> None:
    call("run", job)
    made = call("retry-errors", job.parent / "out", "--to", job.parent / "again")
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert lines[0] == "1 row failed; most frequent errors:"
    assert lines[1].split() == ["1", "prompt", "is", "null"]
    assert lines[2] == f"run them again: twotower run {job.parent}/again/job.yaml"
    again = call("run", job.parent / "again/job.yaml", "--set", "retry.max_error_rate=1")
    assert "job small-retry is complete: 1 row: 0 ok, 1 error\n" in again.stdout
    assert "is not an empty folder" in call("retry-errors", job.parent / "out", "--to", job.parent / "again").stderr
    assert call("retry-errors", job.parent / "out").exit_code == 2


def test_retry_errors_without_errors_writes_nothing(job: Path) -> None:
    add_file(job, "a.parquet", 3)
    call("run", job)
    before = files_of(job.parent)
    assert call("retry-errors", job.parent / "out", "--to", job.parent / "again").stdout == (
        "no row of a finished part failed: nothing was written\n"
    )
    assert files_of(job.parent) == before


def test_clean_shows_and_removes_leftovers(job: Path) -> None:
    call("run", job)
    out = job.parent / "out"
    assert call("clean", out).stdout == "nothing to remove\n"
    before = files_of(out)
    (out / "_writable").write_bytes(b"123")
    said = "temporary files (1 file, 3 bytes): _writable\n"
    assert call("clean", out, "--dry-run").stdout == f"would remove {said}"
    assert (out / "_writable").exists()
    assert call("clean", out).stdout == f"removed {said}"
    assert files_of(out) == before


def test_plan_names_unreadable_files_and_exits_with_1(job: Path) -> None:
    (job.parent / "in" / "b.parquet").write_text("no Parquet at all")
    result = call("plan", job)
    assert result.exit_code == 1
    assert "1 file, 35 rows" in result.stdout
    assert "error: input file b.parquet cannot be read: is not Parquet" in result.stderr


@pytest.mark.slow
def test_help_and_plan_import_neither_ray_nor_torch(job: Path) -> None:
    for arguments in (["--help"], ["plan", str(job)]):
        script = f"""
import sys
from pipeline.cli.app import app
try:
    app({arguments!r})
except SystemExit as error:
    assert not error.code, error.code
heavy = [name for name in ("ray", "torch", *(["pyarrow"] if {len(arguments)} == 1 else [])) if name in sys.modules]
assert not heavy, heavy
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)


def test_python_m_pipeline_is_the_command_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 0
    assert "twotower" in result.stdout
    assert all(command in result.stdout for command in ("run", "plan", "status", "verify", "retry-errors", "clean"))


def test_a_thread_that_waits_for_storage_does_not_keep_the_process() -> None:
    """When Python exits, it joins the threads of executors, and such a thread may retry a storage for minutes after a
    stop."""
    script = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import pipeline.__main__
ThreadPoolExecutor().submit(threading.Event().wait, 3600)
pipeline.__main__.LEAVE_S = 0.1
pipeline.__main__.app = lambda **_: sys.exit(143)
pipeline.__main__.main()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=PATIENCE_S).returncode == 143
