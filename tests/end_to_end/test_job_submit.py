"""`ray job submit` against a real head with its job server and token authentication: the README's first command."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.config.loader import load_job

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--ray-client-server-port",
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A running head, and the environment of who submits to it."""

    environment: dict[str, str]

    def submit(
        self, *entrypoint: str, variables: dict[str, str], wait: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", *(() if wait else ("--no-wait",))]
        command += ["--runtime-env-json", json.dumps({"env_vars": variables}), "--", *entrypoint]
        return self.call(command)

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=200,
        )

    def ask(self, path: str) -> dict[str, Any]:
        """What the job server says of a job; `ray job status` and `logs` take seconds to start."""
        url = f"{self.environment['RAY_ADDRESS']}/api/jobs/{path}"
        with urllib.request.urlopen(request_of(url), timeout=10) as answer:
            said: dict[str, Any] = json.load(answer)
        return said


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A short path: sockets below it may not be longer than 107 characters.
    with tempfile.TemporaryDirectory(prefix="tt", ignore_cleanup_errors=True) as home:
        (Path(home) / ".ray").mkdir()
        (Path(home) / ".ray" / "auth_token").write_text(TOKEN)
        ports = free_ports(len(PORT_OPTIONS))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TWOTOWER_"))}
        environment |= {
            "HOME": home,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={home}/r"]
        command += ["--object-store-memory=104857600", "--disable-usage-stats"]
        command += [f"{option}={port}" for option, port in zip(PORT_OPTIONS, ports, strict=True)]
        log = Path(home) / "head.log"
        with log.open("w") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{ports[1]}"
            wait_for_server(address, process, log)
            yield Head({**environment, "RAY_ADDRESS": address})
        finally:
            process.terminate()  # `ray start --block` takes its processes with it
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def request_of(url: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})


def wait_for_server(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    request = request_of(f"{address}/api/jobs/")
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_the_server_wants_the_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"{head.environment['RAY_ADDRESS']}/api/jobs/", timeout=10)
    assert raised.value.code == 401
    raised.value.close()


def test_demo_job_runs_and_its_output_is_read_with_duckdb_and_pandas(head: Head, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = head.submit("jobs/demo.yaml", variables={"TWOTOWER_OUT": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    assert "is complete: " in done.stdout
    assert "Traceback" not in done.stdout
    job = load_job(str(ROOT / "jobs" / "demo.yaml"))
    rows = pq.read_metadata(job.input.path).num_rows
    assert rows >= 500

    query = (
        f"SELECT finish_reason, count(*), sum(completion_tokens)/sum(latency_s) FROM '{out}/part-*.parquet' GROUP BY 1"
    )
    reasons = {reason: (count, rate) for reason, count, rate in duckdb.execute(query).fetchall()}
    assert sum(count for count, _ in reasons.values()) == rows
    assert all(rate > 0 for reason, (_, rate) in reasons.items() if reason != "error")
    frame = pd.concat(pd.read_parquet(part) for part in sorted(out.glob("part-*.parquet")))
    assert len(frame) == rows == frame["id"].nunique()
    assert len(frame[["source_file", "source_row"]].drop_duplicates()) == rows
    manifest = json.loads((out / "_job" / "manifest.json").read_text())
    assert manifest["rows"] == rows
    assert (out / "_SUCCESS").exists()


def test_a_failing_job_fails_with_one_line(head: Head, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text((ROOT / "jobs" / "demo.yaml").read_text() + "\nworkerz: {}\n")
    failed = head.submit("python", "-m", "pipeline", "run", str(bad), variables={"TWOTOWER_OUT": str(tmp_path)})
    assert failed.returncode == 1
    # Ray shows the end of a failed job's log once more, as the job's status.
    [line] = {line for line in failed.stdout.splitlines() if line.startswith("error: ")}
    assert "workerz" in line
    assert "Traceback" not in failed.stdout
    assert not (tmp_path / "demo").exists()


def test_a_stopped_job_says_how_to_resume_and_does(head: Head, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    variables = {"TWOTOWER_OUT": str(tmp_path), "RAY_JOB_STOP_WAIT_TIME_S": "20"}
    command = ["python", "-m", "pipeline", "run", "jobs/demo.yaml", "--set", "output.rows_per_file=10"]
    command += ["--set", "generation.max_new_tokens=16", "--set", "engine.max_rows=2"]
    submitted = head.submit(*command, variables=variables, wait=False)
    job_id = next(word.strip("'") for word in submitted.stdout.split() if word.startswith("'raysubmit_"))
    deadline = time.monotonic() + 120
    while not list(out.glob("part-*.parquet")):
        assert time.monotonic() < deadline, head.ask(f"{job_id}/logs")["logs"]
        time.sleep(0.2)
    head.call([str(BIN / "ray"), "job", "stop", job_id])
    while head.ask(job_id)["status"] != "STOPPED":
        assert time.monotonic() < deadline, head.ask(f"{job_id}/logs")["logs"]
        time.sleep(0.2)
    assert "submit the same job again to resume" in head.ask(f"{job_id}/logs")["logs"]
    assert not (out / "_SUCCESS").exists()
    before = {part.name: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}

    resumed = head.submit(*command[:-1], "engine.max_rows=16", variables=variables)
    assert resumed.returncode == 0, resumed.stdout
    assert "units before)" in resumed.stdout
    assert before.items() <= {part.name: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}.items()
