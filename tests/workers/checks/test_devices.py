"""What `doctor` looks at with torch, and of a Ray cluster; and the command itself."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import model.checkpoint.loader
import model.checkpoint.released
import model.checks.kernels
import workers.checks.kernels
import workers.cluster.checks
import workers.cluster.connection
from model.builtin.noise import CONFIG
from model.checkpoint.config import TwoTowerConfig
from model.checks.kernels import KernelError
from model.errors import RequestError
from pipeline.checks.findings import Finding
from pipeline.cli.app import app
from pipeline.config.job import Job
from pipeline.core.errors import ClusterError
from workers.checks.devices import check_gpus, check_plan
from workers.checks.kernels import check_kernels
from workers.cluster.checks import check_cluster

pytestmark = [pytest.mark.ray, pytest.mark.server]

JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
workers: {{gpus: 0}}
"""


def job_for(gpus: int) -> Job:
    """A job whose replicas have so many GPUs."""
    sections = {"input": {"path": "in"}, "output": {"path": "out"}, "model": {"checkpoint": "builtin:noise"}}
    return Job.model_validate({**sections, "workers": {"gpus": gpus}})


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_looks_at_the_machine_and_at_the_job(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in" / "a.parquet")
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "job.yaml"), "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"]) == (0, True), told
    names = {line["check"] for line in told["checks"]}
    assert {"python", "torch", "memory", "gpus", "kernels", "plan", "ray", "job", "input", "checkpoint"} <= names
    [plan] = [line["found"] for line in told["checks"] if line["check"] == "plan"]
    assert "max_rows 16, kv_tokens 131,072" in plan
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("address", "level"), [(None, "FAIL"), ("head:6379", "warn")])
def test_a_job_for_more_gpus_than_are_here_fails_unless_a_cluster_may_have_them(
    monkeypatch: pytest.MonkeyPatch, address: str | None, level: str
) -> None:
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    [found] = check_plan(job_for(100))
    assert found.level == level
    assert "a replica asks for 100 GPU" in found.found


def test_a_wrong_kernel_fails_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_pair: object) -> None:
        raise KernelError("kernel attend of PlainKernels is wrong on cpu")

    monkeypatch.setattr(model.checks.kernels, "check_kernels", wrong)
    first, *_ = check_kernels()
    assert first == Finding("FAIL", "cpu: kernel attend of PlainKernels is wrong on cpu")


def test_layers_of_the_released_sizes_are_checked_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """By declaration: small layers in their place, on the CPU. Random weights pass the kernels' check."""
    monkeypatch.setattr(model.checkpoint.released, "RELEASED_CONFIG", TwoTowerConfig.from_dict(dict(CONFIG)))
    pair = workers.checks.kernels._released_layers("cpu")
    assert [layer.kind for layer in pair.context.layers] == ["mamba", "attention", "moe"]
    assert pair.denoiser is None
    model.checks.kernels.check_kernels(pair)
    monkeypatch.setattr(model.checkpoint.loader, "free_memory", lambda _device: 1 << 30)
    with pytest.raises(RequestError, match=r"1\.0 GiB are free, too few for a layer of each kind .* \(4 GiB\): stop"):
        workers.checks.kernels._released_layers("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_of_this_gpu_are_right_at_the_released_sizes() -> None:
    [line] = [line for line in check_kernels() if line.found.startswith("cuda:0: ")]
    assert line.level == "ok", line
    assert "s for released sizes" in line.found


@pytest.mark.parametrize(
    ("capability", "free", "level", "text"),
    [
        ((9, 0), 79 << 30, "ok", "cuda:0 H100, 79.0 of 80.0 GiB free, compute capability 9.0, driver"),
        ((9, 0), 30 << 30, "warn", "others hold the rest"),
        ((7, 5), 79 << 30, "warn", "no bfloat16"),
    ],
)
def test_a_gpu_is_told_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int, level: str, text: str
) -> None:
    """By declaration: what torch would say."""
    properties = SimpleNamespace(name="H100", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (free, 80 << 30))
    [found] = check_gpus(None)
    assert found.level == level
    assert text in found.found


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


@pytest.mark.slow
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
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    [found] = check_cluster(None, f"http://user:secret@127.0.0.1:{port}")
    assert found.level == "FAIL"
    assert "no job server answers at" in found.found
    assert "secret" not in str(found)


@pytest.mark.slow
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
        ("import time; time.sleep(60)", 2, "FAIL", "was not joined within 2 s"),
    ],
)
def test_a_cluster_is_joined_by_a_process_that_may_hang(
    monkeypatch: pytest.MonkeyPatch, child: str, gpus: int, level: str, text: str
) -> None:
    """By declaration: what the process that joins would print."""
    monkeypatch.setattr(workers.cluster.checks, "JOIN", child)
    monkeypatch.setattr(workers.cluster.checks, "JOIN_S", 2 if "sleep" in child else 60)
    monkeypatch.setattr(workers.cluster.connection, "check_reachable", lambda _address: None)
    [found] = check_cluster(job_for(gpus), "head:6379")
    assert found.level == level
    assert text in found.found


def test_a_cluster_where_nobody_answers_is_told_at_once() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    with pytest.raises(ClusterError, match="no Ray cluster answers there"):
        list(check_cluster(None, f"127.0.0.1:{port}"))
