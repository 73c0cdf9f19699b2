"""Tests `ray job submit` against a real head with its job server and token authentication."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
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
from tests.ports import held_ports
from tests.waiting import PATIENCE_S, wait_until

# each wait within a test has a deadline of its own
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
OWN_CHOICE = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--min-worker-port",
    "--max-worker-port",
)
"""Options for which 0 lets each process of the head bind a free port and report its number to the others. A number
chosen beforehand could be taken by then."""
ANSWER_S = 60.0
"""Seconds allowed for one answer of the head."""


@dataclass(frozen=True)
class Head:
    """A head that runs jobs, and the environment of a process that submits to it."""

    environment: dict[str, str]
    log: Path

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
            timeout=600,
        )

    def ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the job server's answer to a GET, or to a POST of `content`.

        `ray job status`, `logs` and `stop` do the same, but are slow to start.
        """
        data = None if content is None else json.dumps(content).encode()
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.environment['RAY_ADDRESS']}/api/jobs/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            said: dict[str, Any] = json.load(answer)
        return said

    def log_of(self, job_id: str) -> str:
        """Return what a job has printed."""
        return str(self.ask(f"{job_id}/logs")["logs"])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A short path, because the paths of sockets below it may not be longer than 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="tt", ignore_cleanup_errors=True) as home,
        held_ports(1) as [client_port],  # the one port that Ray does not choose by itself
    ):
        (Path(home) / ".ray").mkdir()
        (Path(home) / ".ray" / "auth_token").write_text(TOKEN)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TWOTOWER_"))}
        environment |= {
            "HOME": home,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_COLOR": "1",
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={home}/r"]
        command += ["--object-store-memory=104857600", "--disable-usage-stats"]
        command += [*(f"{option}=0" for option in OWN_CHOICE), f"--ray-client-server-port={client_port}"]
        log = Path(home) / "head.log"
        with log.open("w") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            found = Head({**environment, "RAY_ADDRESS": address_of(process, log)}, log)
            wait_until_jobs_run(found, process)
            yield found
        finally:
            process.terminate()  # `ray start --block` then ends its processes as well
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def address_of(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address of the job server of the head that writes this log."""

    def look() -> re.Match[str] | None:
        ended = process.poll() is not None
        found = re.search(r"RAY_(?:API_SERVER_)?ADDRESS='(http://[\d.]+:\d+)' ray job submit", log.read_text())
        assert found or not ended, log.read_text()
        return found

    found = wait_until(look, log.read_text)
    assert found is not None
    return found[1]


def wait_until_jobs_run(head: Head, process: subprocess.Popen[bytes]) -> None:
    """Wait until a first job has succeeded: the job server answers before it has an agent that takes jobs."""
    last: list[object] = []

    def submit() -> str:
        assert process.poll() is None, head.log.read_text()
        try:
            return str(head.ask("", {"entrypoint": "true"})["submission_id"])
        except urllib.error.HTTPError as error:
            with error:
                last.append(f"{error.code}: {error.read().decode(errors='replace')}")
        except OSError as error:
            last.append(error)
        return ""

    def told() -> str:
        return f"{last[-1:]} {head.log.read_text()}"

    job_id = wait_until(submit, told, pause_s=0.2)
    ended = wait_until(lambda: job_ended(head, job_id), told, pause_s=0.2)
    assert ended == "SUCCEEDED", head.log_of(job_id)


def job_ended(head: Head, job_id: str) -> str:
    """Return how a job ended, or "" while it runs."""
    status = str(head.ask(job_id)["status"])
    return status if status in ("SUCCEEDED", "FAILED", "STOPPED") else ""


def test_the_server_wants_the_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"{head.environment['RAY_ADDRESS']}/api/jobs/", timeout=ANSWER_S)
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
    # Ray shows the end of a failed job's log once more, as the status of the job.
    [line] = {line for line in failed.stdout.splitlines() if line.startswith("error: ")}
    assert "workerz" in line
    assert "Traceback" not in failed.stdout
    assert not (tmp_path / "demo").exists()


def test_a_stopped_job_says_how_to_resume_and_does(head: Head, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    prompts = tmp_path / "prompts.parquet"
    pq.write_table(pq.read_table(ROOT / "jobs" / "demo_prompts.parquet").slice(0, 120), prompts)
    # seconds until Ray kills a job that it has asked to stop
    variables = {"TWOTOWER_OUT": str(tmp_path), "RAY_JOB_STOP_WAIT_TIME_S": f"{PATIENCE_S:g}"}
    command = ["python", "-m", "pipeline", "run", "jobs/demo.yaml"]
    settings = [f"input.path={prompts}", "output.rows_per_file=10", "generation.max_new_tokens=16"]
    settings += ["workers.replicas=1", "engine.max_rows=2"]
    command += [word for setting in settings for word in ("--set", setting)]
    submitted = head.submit(*command, variables=variables, wait=False)
    job_id = next(word.strip("'") for word in submitted.stdout.split() if word.startswith("'raysubmit_"))

    def first_part() -> bool:
        assert not job_ended(head, job_id), head.log_of(job_id)
        return bool(list(out.glob("part-*.parquet")))

    wait_until(first_part, lambda: head.log_of(job_id))
    head.ask(f"{job_id}/stop", {})  # not by `ray job stop`, which might take as long to start as the job takes
    ended = wait_until(lambda: job_ended(head, job_id), lambda: head.log_of(job_id))
    assert ended == "STOPPED", head.log_of(job_id)
    assert "submit the same job again to resume" in head.log_of(job_id)
    assert not (out / "_SUCCESS").exists()
    before = {part.name: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}

    resumed = head.submit(*command[:-1], "engine.max_rows=16", variables=variables)
    assert resumed.returncode == 0, resumed.stdout
    assert "units done before)" in resumed.stdout
    assert before.items() <= {part.name: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}.items()
