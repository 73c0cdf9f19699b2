"""Tests whole jobs from the command line with the real model: the output depends on the job, not on how it was run."""

import os
import signal
import subprocess
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.waiting import PATIENCE_S, last_words, wait_for
from tests.workers.fakes import run_locally
from tests.workers.jobs import SmallJob, open_job
from workers.replica import build
from workers.replica.local_pool import LocalPool
from workers.units import loader
from workers.units.runner import UnitRunner

# runs jobs one after the other, some of them on Ray
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ROWS = 60
BAD = {3: "prompt is null", 17: "prompt is empty", 31: "not UTF-8", 44: "exceed the context"}
# the columns that must be equal; times, batch sizes and names of replicas may differ from run to run
SAME = "id, part, completion, finish_reason, error, prompt_tokens, completion_tokens, mode, denoiser_forwards, blocks"
SAME += ", steps_per_block, forced_commits, mean_confidence, source_file, source_row"


def write_input(path: Path) -> None:
    """Write prompts of up to 400 bytes with four bad ones among them, and a carried column with a null."""
    prompts: list[bytes | None] = [f"prompt {i}: ".encode() + b"lorem ipsum " * (i * 7 % 33) for i in range(ROWS)]
    prompts[3], prompts[17], prompts[31], prompts[44] = None, b"", b"caf\xe9", b"x" * 9000
    column = pa.array(prompts, pa.binary()).view(pa.string())
    table = pa.table(
        {"id": pa.array(range(ROWS), pa.int64()), "prompt": column, "part": [*(["a", "b"] * 29), None, "c"]}
    )
    pq.write_table(table, path, row_group_size=25)


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_input(folder / "in.parquet")
    job: dict[str, Any] = {
        "input": {"path": str(folder / "in.parquet"), "id_column": "id", "carry": ["part"]},
        "output": {"path": "${OUT}", "rows_per_file": 10},
        "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
        "generation": {
            "max_new_tokens": 24,  # a block and a half
            "steps_per_block": 8,
            "confidence_threshold": 0.8,
            "temperature": 1.0,
            "top_p": 0.95,
            "seed": 3,
            "eos_ids": [2, 10, 11, 12],
        },
        "workers": {"gpus": 0, "cpus": 1, "replicas": 1},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job_file: Path, out: Path, *options: str, cluster: str = "") -> "subprocess.Popen[str]":
    """Start the job as a process, on the cluster of that address unless an option says --local."""
    command = [sys.executable, "-m", "pipeline", "run", str(job_file), "--log-every", "0.2", *options]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"OUT": str(out), **({"RAY_ADDRESS": cluster} if cluster else {})}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    try:
        text, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


def rows(out: Path) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        return connection.sql(f"SELECT {SAME} FROM '{out}/part-*.parquet' ORDER BY source_row").fetchall()


@pytest.fixture(scope="module")
def expected(job_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Return the rows of the job, run in one process and one row at a time."""
    out = tmp_path_factory.mktemp("alone") / "out"
    finish(start(job_file, out, "--local", "--set", "engine.max_rows=1"))
    return rows(out)


def test_every_input_row_leaves_once(expected: list[tuple[Any, ...]]) -> None:
    """Every input row is in the output once, with its id and carried values; bad rows are error rows with a reason."""
    assert [row[0] for row in expected] == list(range(ROWS)) == [row[-1] for row in expected]
    assert [row[1] for row in expected] == [*(["a", "b"] * 29), None, "c"]
    errors = {row[0]: row[4] for row in expected if row[3] == "error"}
    assert errors.keys() == BAD.keys()
    for index, text in BAD.items():
        assert text in errors[index]
    assert {row[3] for row in expected} == {"error", "stop", "length"}  # the rows end in every possible way


@pytest.mark.parametrize(
    "options",
    [
        ("--local", "--set", "engine.max_rows=3"),
        ("--local", "--set", "engine.max_rows=16", "--set", "engine.max_prefill_tokens=300"),
        ("--set", "engine.max_rows=16"),
        ("--set", "engine.max_rows=3", "--set", "workers.replicas=2"),
    ],
    ids=["3 rows", "16 rows", "1 replica on Ray", "2 replicas on Ray"],
)
def test_the_same_job_gives_the_same_rows(
    request: pytest.FixtureRequest,
    job_file: Path,
    tmp_path: Path,
    expected: list[tuple[Any, ...]],
    options: tuple[str, ...],
) -> None:
    """Sampled results in float32, including confidences, are bit-equal for any row limit and any number of replicas."""
    cluster = "" if "--local" in options else request.getfixturevalue("ray_cluster").address
    finish(start(job_file, tmp_path / "out", *options, cluster=cluster))
    assert rows(tmp_path / "out") == expected


def test_a_killed_job_resumes_to_the_same_rows(job_file: Path, tmp_path: Path, expected: list[tuple[Any, ...]]) -> None:
    """After kill -9 of the driver in the middle, the same command does the rest, and no finished part changes."""
    out = tmp_path / "out"
    process = start(job_file, out, "--local", "--set", "engine.max_rows=1")
    wait_for(process, lambda: len(list(out.glob("part-*.parquet"))) >= 2)
    process.send_signal(signal.SIGKILL)
    last_words(process)
    survived = {part: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}
    assert 2 <= len(survived) < 7
    assert not (out / "_SUCCESS").exists()

    text = finish(start(job_file, out, "--local"))
    assert rows(out) == expected
    assert {part: part.stat().st_mtime_ns for part in survived} == survived
    assert (out / "_SUCCESS").exists()
    assert "units done before" in text
    assert "was complete already" in finish(start(job_file, out, "--local"))


def test_a_stopped_job_says_how_to_go_on(job_file: Path, tmp_path: Path) -> None:
    """After SIGTERM the exit code is 143, and one line tells what is done and how to resume."""
    out = tmp_path / "out"
    process = start(job_file, out, "--local", "--set", "engine.max_rows=1")
    wait_for(process, lambda: list(out.glob("part-*.parquet")))
    process.terminate()
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143, text
    assert "submit the same job again to resume" in text.splitlines()[-1]
    assert "Traceback" not in text


TEMPLATE = "You are asked a question about the text that follows; answer it in a few words, and nothing else. " * 3


@dataclass
class TinyMaker:
    """A maker of runners with the real engine in this process; it keeps the last engine."""

    small: SmallJob
    engine: Any = None

    def __call__(self, replica: str) -> UnitRunner:
        runner = build.make_runner(self.small.spec, replica)
        self.engine = runner._engine
        return runner


@pytest.mark.parametrize("mode", ["diffusion", "mock_ar", "ar"])
def test_sharing_a_prefix_changes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Sharing a template of nearly 300 tokens changes no confidence by a bit, in two units with some odd rows."""
    prompts = [f"{TEMPLATE}{'lorem ipsum ' * (i % 5)}{i}" for i in range(14)]
    prompts[2], prompts[8], prompts[12] = "no template", TEMPLATE[:100], TEMPLATE[1:]
    generation = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95, "seed": 5, "mode": mode}
    outcome, shared = {}, {}
    for name in ("with", "without"):
        small = open_job(tmp_path / name, prompts, rows_per_file=10, generation=generation, engine={"max_rows": 4})
        maker = TinyMaker(small)
        if name == "without":
            monkeypatch.setattr(loader, "best_prefix", lambda _prompts, _known: array("i"))
        run_locally(small, LocalPool(maker))
        outcome[name] = [(row["completion"], row["steps_per_block"], row["mean_confidence"]) for row in small.rows()]
        shared[name] = maker.engine.stats.shared_tokens
    assert shared == {"with": 11 * 256, "without": 0}
    assert outcome["with"] == outcome["without"]
