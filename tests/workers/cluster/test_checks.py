"""Tests of the checks that `doctor` makes of a Ray cluster and of its job server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ray

import workers.cluster.checks
import workers.cluster.connection
from pipeline.core.errors import ClusterError
from tests.ports import held_ports
from tests.waiting import PATIENCE_S
from tests.workers.checks.test_devices import job_for
from workers.cluster.checks import check_cluster

pytestmark = [pytest.mark.ray, pytest.mark.server]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def job_server(version: str, token: str | None) -> Iterator[str]:
    """Answers as Ray's job server does; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            status = 401 if token and not given else 403 if token and given != f"Bearer {token}" else 200
            self.send_response(status if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": version}).encode() if status == 200 else b"")

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


HERE = metadata.version("ray")


@pytest.mark.parametrize(
    ("version", "theirs", "ours", "level", "text"),
    [
        (HERE, "abc", "abc", "ok", "asks for a token and takes that of RAY_AUTH_TOKEN"),
        (HERE, "abc", "xyz", "FAIL", "refuses the token of RAY_AUTH_TOKEN"),
        (HERE, "abc", None, "FAIL", "asks for a token, and there is none here"),
        (HERE, None, None, "warn", "asks for no token"),
        ("2.9.1", "abc", "abc", "warn", "runs Ray 2.9.1"),
    ],
)
def test_a_job_server_is_asked_as_a_submission_would(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    theirs: str | None,
    ours: str | None,
    level: str,
    text: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if ours:
        monkeypatch.setenv("RAY_AUTH_TOKEN", ours)
    with job_server(version, theirs) as address:
        [found] = check_cluster(None, address)
    assert found.level == level
    assert text in found.found
    assert ours is None or ours not in found.found + found.fix


def test_no_job_server_fails() -> None:
    with held_ports(1) as [port]:
        [found] = check_cluster(None, f"http://user:secret@127.0.0.1:{port}")
    assert found.level == "FAIL"
    assert "no job server answers at" in found.found
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("child", "gpus", "level", "text"),
    [
        (
            'print(\'hello\'); print(\'[{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}]\')',
            2,
            "ok",
            "0 GPU, 8 CPU; 2 GPU, 4 CPU",
        ),
        ('print(\'[{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}]\')', 4, "FAIL", "no node has 4 GPU, 1 CPU for a replica"),
        ("raise SystemExit('no token')", 2, "FAIL", "cannot be joined: no token"),
        ("import time; time.sleep(3600)", 2, "FAIL", "was not joined within 2 s"),
    ],
)
def test_a_cluster_is_joined_by_a_process_that_may_hang(
    monkeypatch: pytest.MonkeyPatch, child: str, gpus: int, level: str, text: str
) -> None:
    """By declaration: what the process that joins would print."""
    monkeypatch.setattr(workers.cluster.checks, "JOIN", child)
    monkeypatch.setattr(workers.cluster.checks, "JOIN_S", 2 if "sleep" in child else PATIENCE_S)
    monkeypatch.setattr(workers.cluster.connection, "check_reachable", lambda _address: None)
    [found] = check_cluster(job_for(gpus), "head:6379")
    assert found.level == level
    assert text in found.found


def test_a_cluster_where_nobody_answers_is_told_at_once() -> None:
    with held_ports(1) as [port], pytest.raises(ClusterError, match="no Ray cluster answers there"):
        list(check_cluster(None, f"127.0.0.1:{port}"))


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a plain Exception then; a fault of the program is none of that kind and stays what it is."""

    def raising(error: Exception) -> Any:
        def init(**_: Any) -> None:
            raise error

        return init

    monkeypatch.setattr(ray, "init", raising(Exception("The node timed out\nduring startup.")))
    with pytest.raises(ClusterError, match=r"^Ray did not start on this machine: The node timed out during startup\."):
        workers.cluster.connection.connect()
    monkeypatch.setattr(ray, "init", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        workers.cluster.connection.connect()


def test_a_ray_that_does_not_start_in_time_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need more than the 30 s that Ray allows: the second start joins."""
    starts = iter([Exception("The node timed out during startup."), None])

    def init(**_: Any) -> None:
        error = next(starts)
        if error is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    assert workers.cluster.connection.connect()
    assert list(starts) == []


def test_a_job_that_is_being_stopped_does_not_start_ray_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[object] = []

    def init(**_: Any) -> None:
        starts.append(None)
        raise Exception("The node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=r"; submit the same job again to resume$"):
        workers.cluster.connection.connect(lambda: True)
    assert len(starts) == 1
