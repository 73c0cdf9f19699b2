"""Tests of the checks of `doctor` that need neither torch nor Ray: each check ends with a line, whatever happens."""

import json
import os
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.checks import machine
from pipeline.checks.findings import Check, Finding, Line, examine, fail, ok, report, warn
from pipeline.checks.job import job_checks, open_job
from pipeline.checks.machine import check_authentication, check_clock, check_credentials, check_python, token_source
from pipeline.config.job import Job
from pipeline.core.errors import StorageError
from pipeline.storage.storage import Storage
from tests.waiting import PATIENCE_S


def lines_of(*checks: Check) -> dict[str, Line]:
    """Run the checks and return their lines by the name of the check. Each check must have exactly one line."""
    lines = list(examine(checks))
    assert [line.check for line in lines] == [check.name for check in checks]
    return {line.check: line for line in lines}


def raising(error: BaseException) -> Iterator[Finding]:
    yield from ()
    raise error


def test_whatever_a_check_does_there_is_a_line_and_the_next_one_runs() -> None:
    hanging = threading.Event()
    try:
        lines = lines_of(
            Check("hangs", lambda: hanging.wait(PATIENCE_S) and [], seconds=0.1),  # type: ignore[arg-type, return-value]
            Check("breaks", lambda: raising(ZeroDivisionError("1\n/0"))),
            Check("leaves", lambda: raising(SystemExit(3))),
            Check("refuses", lambda: raising(StorageError("no bucket; make one")), advice="or two"),
            Check("well", lambda: [ok("all is well")]),
        )
    finally:
        hanging.set()
    assert [line.level for line in lines.values()] == ["FAIL"] * 4 + ["ok"]
    assert lines["hangs"].found == "no answer within 0.1 s"
    assert lines["breaks"].found == "the check itself failed: ZeroDivisionError: 1 /0"
    assert lines["refuses"].text() == "FAIL  refuses     no bucket; make one; fix: or two"
    assert lines["well"].text() == "ok    well        all is well"


@pytest.mark.parametrize(("last", "well"), [(ok("c"), True), (warn("c", "d"), True), (fail("c", "d"), False)])
def test_a_report_is_well_unless_something_fails(last: Finding, well: bool) -> None:
    checks = [Check("a", lambda: [ok("b")]), Check("b", lambda: [last])]
    shown: list[str] = []
    assert report(examine(checks), shown.append, as_json=False) == well
    assert len(shown) == 2
    shown.clear()
    assert report(examine(checks), shown.append, as_json=True) == well
    told = json.loads(shown.pop())
    assert told["ok"] == well
    assert [(line["check"], line["level"], line["fix"]) for line in told["checks"]] == [
        ("a", "ok", ""),
        ("b", last.level, last.fix),
    ]


@pytest.mark.parametrize(
    ("environ", "token", "level", "text"),
    [
        ({}, None, "ok", "matters for clusters only"),
        ({"RAY_ADDRESS": "head:6379"}, "RAY_AUTH_TOKEN", "warn", "RAY_AUTH_MODE is not set"),
        ({"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "token"}, "RAY_AUTH_TOKEN", "ok", "the token of RAY_AUTH_TOKEN"),
        ({"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "token"}, None, "FAIL", "there is no token"),
        ({"RAY_AUTH_MODE": "token"}, None, "ok", "makes one"),
        ({"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "disabled"}, None, "warn", "can run code"),
        ({"RAY_AUTH_MODE": "off"}, None, "FAIL", "RAY_AUTH_MODE is 'off'"),
    ],
)
def test_how_this_process_would_meet_a_cluster(
    environ: dict[str, str], token: str | None, level: str, text: str
) -> None:
    found = check_authentication(environ, token)
    assert found.level == level
    assert text in found.found
    assert bool(found.fix) == (level != "ok")


def test_where_the_token_is_taken_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_source({}) is None
    assert token_source({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert token_source({}) == "~/.ray/auth_token"
    assert token_source({"RAY_AUTH_TOKEN": "secret"}) == "RAY_AUTH_TOKEN"


def test_packages_are_held_against_what_the_project_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    [here] = check_python()
    assert here.level == "ok"
    real = metadata.version

    def version(name: str) -> str:
        if name == "s3fs":
            raise metadata.PackageNotFoundError(name)
        return "2.9.1" if name == "ray" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    [found] = check_python()
    assert found.level == "FAIL"
    assert "ray is 2.9.1, needed is <3,>=2.60" in found.found
    assert "s3fs is missing" in found.found


@pytest.mark.server
def test_a_clock_that_is_an_hour_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is frozen, so that a slow answer on a busy machine does not change the offset."""
    offsets, now = iter((3600, 0)), time.time()
    monkeypatch.setattr(machine, "time", SimpleNamespace(time=lambda: now, strftime=time.strftime, gmtime=time.gmtime))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(403)  # every answer has a date, whatever its status is
            self.send_header("Date", formatdate(now + next(offsets), usegmt=True))
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = [line for _ in range(2) for line in check_clock(f"http://127.0.0.1:{server.server_port}")]
        server.shutdown()
    assert [line.level for line in found] == ["warn", "ok"]
    assert "3600 s from" in found[0].found or "3599 s from" in found[0].found  # a date has whole seconds


def test_credentials_are_found_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert [line.level for needed in (True, False) for line in check_credentials(needed)] == ["warn", "ok"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDSECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "KEYSECRET")
    [found] = check_credentials(True)
    assert found.level == "ok"
    assert "SECRET" not in str(found)


def small(folder: Path, **sections: Any) -> Job:
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), folder / "in" / "a.parquet")
    return Job.model_validate(
        {
            "name": "small",
            "input": {"path": str(folder / "in")},
            "output": {"path": str(folder / "far" / "out")},
            "model": {"checkpoint": "builtin:noise"},
            "workers": {"gpus": 0},
            **sections,
        }
    )


def test_a_job_that_can_run_and_nothing_is_left_behind(tmp_path: Path) -> None:
    lines = list(examine(job_checks(small(tmp_path))))
    assert {line.check: line.level for line in lines} == {"input": "ok", "output": "ok", "checkpoint": "ok"}
    assert "a.parquet has 2 rows" in lines[0].found
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("sections", "check", "text"),
    [
        ({"input": {"path": "{}/in", "prompt_column": "text"}}, "input", "has no column text"),
        ({"input": {"path": "{}/none"}}, "input", "does not exist"),
        ({"output": {"path": "{}/in/a.parquet"}}, "output", "a.parquet is a file; fix: give output.path a folder"),
        ({"model": {"checkpoint": "{}/in"}}, "checkpoint", "config.json is missing; fix: check model.checkpoint"),
        ({"generation": {"max_new_tokens": 100_000}}, "checkpoint", "no prompt would fit"),
    ],
)
def test_a_job_that_cannot_run(tmp_path: Path, sections: dict[str, Any], check: str, text: str) -> None:
    filled = json.loads(json.dumps(sections).replace("{}", str(tmp_path)))
    lines = {line.check: line for line in examine(job_checks(small(tmp_path, **filled)))}
    assert {name for name, line in lines.items() if line.level != "ok"} == {check}
    assert lines[check].level == "FAIL"
    assert text in lines[check].text()


def test_a_store_where_the_last_writer_wins_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers ignore If-None-Match. With them, two replicas could publish the same part."""

    def create(self: Storage, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    monkeypatch.setattr(Storage, "create", create)
    _, output, _ = examine(job_checks(small(tmp_path)))
    assert output.level == "FAIL"
    assert "conditional writes" in output.fix


def test_a_broken_job_file_is_a_line_as_well(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("input: {path: in}\nouptut: {path: out}")
    settings, checks = open_job(str(tmp_path / "job.yaml"), ())
    assert settings is None
    [line] = examine(checks)
    assert line.level == "FAIL"
    assert "ouptut" in line.found or "output is missing" in line.found
