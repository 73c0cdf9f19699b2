"""Tests `python -m pipeline run` as a process with a Ray cluster of its own: Ctrl-C, SIGHUP, SIGTERM, and a dead
address."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ports import held_ports
from tests.waiting import PATIENCE_S, last_words, wait_for

# each test starts a Ray of its own, and each wait within it has its own deadline
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out, rows_per_file: 5}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation: {{max_new_tokens: 32}}
engine: {{max_rows: 1}}
workers: {{gpus: 0, cpus: 1, replicas: 1}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    prompts = [f"Lamp number {i} is lit." for i in range(200)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(folder=tmp_path))
    return file


def start(job: Path, **variables: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TWOTOWER_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(job)],
        env={**clean, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str]) -> str:
    """Return what a process printed that has been told to end. Raises AssertionError if it does not end."""
    try:
        return process.communicate(timeout=PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it does not end: {last_words(process)}") from None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_terminal_stops_the_job_and_its_cluster(job: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C and the end of the terminal reach every process of the job, but only the driver acts on them. The
    replicas live on, so that they can save their rows."""
    process = start(job)
    wait_for(process, lambda: list((job.parent / "out").glob("part-*.parquet")))
    os.killpg(process.pid, number)
    output = end_of(process)
    assert process.returncode == code, output
    first, *progress, last = output.splitlines()
    assert first == f"job job: {job.parent}/in -> {job.parent}/out"
    assert last.endswith(" of 40 units are done; submit the same job again to resume")
    assert last.startswith("stopped; ")
    saved = "saved "  # shown if rows of unfinished units were finished
    # Ray's own logs are not shown
    assert all("/200 rows" in line or line.startswith(saved) for line in progress), output


def test_a_dead_ray_address_is_one_line(job: Path) -> None:
    with held_ports(1) as [port]:
        process = start(job, RAY_ADDRESS=f"127.0.0.1:{port}")
        output = end_of(process)
    assert process.returncode == 1
    said = f"error: RAY_ADDRESS is 127.0.0.1:{port}, and no Ray cluster answers there"
    assert output.splitlines()[-1].startswith(said), output


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Return whether the process has a handler of its own for the signal."""
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def descendants(pid: int) -> Iterator[str]:
    """Yield the names of the processes that a process has started, and of those that they have started."""
    yield from (name for _, name in processes_below(pid))


def processes_below(pid: int) -> Iterator[tuple[int, str]]:
    """Yield (pid, name) of the processes that a process has started, and of those that they have started."""
    children: dict[int, list[tuple[int, str]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = stat.read_text().partition(" (")
        except OSError:  # it ended while its file was read
            continue
        name, _, fields = rest.rpartition(") ")
        children.setdefault(int(fields.split()[1]), []).append((int(number), name))
    waiting = [pid]
    while waiting:
        for child, name in children.get(waiting.pop(), []):
            waiting.append(child)
            yield child, name


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize("moment", ["before Ray", "gcs_server", "raylet", "ray::"])
def test_sigterm_while_ray_starts_is_a_stop(job: Path, moment: str) -> None:
    """SIGTERM is a clean stop once the handler is in place, and while Ray's processes and the workers start."""
    process = start(job)
    wait_for(process, lambda: catches(process, signal.SIGTERM))
    if moment != "before Ray":
        wait_for(process, lambda: any(name.startswith(moment) for name in descendants(process.pid)))
    process.terminate()
    output = end_of(process)
    assert process.returncode == 143, output
    last = output.splitlines()[-1]
    assert last.startswith("stopped; ")
    assert last.endswith("; submit the same job again to resume")
    assert "Traceback" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize(
    ("name", "said"),
    [("gcs_server", "the head of the Ray cluster (GCS)"), ("raylet", "Ray on this node (raylet)")],
)
def test_a_cluster_whose_head_is_killed_is_named_and_rows_are_saved(job: Path, name: str, said: str) -> None:
    """Ray itself would end the driver, with a text about GCS and without saving rows, or would go on without a node."""
    process = start(job, RAY_gcs_rpc_server_reconnect_timeout_s="40")
    wait_for(process, lambda: list((job.parent / "out").glob("part-*.parquet")))
    [pid] = [child for child, called in processes_below(process.pid) if called == name]
    os.kill(pid, signal.SIGKILL)
    output = end_of(process)
    assert process.returncode == 1, output
    # after the line, Ray itself may show what was in the log of the process
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the Ray cluster was lost: {said} at ")
    assert line.endswith("submit the same job again to resume")
    assert "Traceback" not in output
