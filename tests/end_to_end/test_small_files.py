"""Tests with the real engine that completions do not depend on how the prompts are divided into files."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.planning.packing import spans_of
from tests.workers.fakes import run_locally
from tests.workers.jobs import SmallJob, open_job, write_prompts
from workers.replica import build
from workers.replica.local_pool import LocalPool

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "jobs/demo_prompts.parquet"
ROWS, ROWS_A_PART = 30, 10
PER_FILE = {"thirty files": 1, "six files": 5, "one file": 30}
"""The number of rows in each file, by the name of the input."""
SAME = (
    *("prompt", "completion", "finish_reason", "error", "prompt_tokens", "completion_tokens", "mode"),
    *("denoiser_forwards", "blocks", "steps_per_block", "forced_commits", "mean_confidence", "repetition"),
)
"""The columns that must be equal. Times, and the names of files and ids, are others."""


def run(folder: Path, prompts: list[str | None], rows_a_file: int) -> SmallJob:
    """Run a job over the prompts in files of this many rows in two folders, listed in the order of the prompts."""
    for start in range(0, ROWS, rows_a_file):
        write_prompts(folder / f"in/{2 * start // ROWS}/{start:02}.parquet", prompts[start : start + rows_a_file])
    small = open_job(
        folder,
        None,
        output={"path": str(folder / "out"), "rows_per_file": ROWS_A_PART, "keep_prompt": True},
        model={"checkpoint": "builtin:tiny", "dtype": "float32"},
        generation={"max_new_tokens": 24, "confidence_threshold": 0.9, "temperature": 0.0},
        engine={"max_rows": 8},
    )
    run_locally(small, LocalPool(lambda replica: build.make_runner(small.spec, replica)))
    return small


def rows_of(small: SmallJob) -> list[dict[str, Any]]:
    """Return the rows of all parts as they lie there, the parts in the order of the plan."""
    parts = [Path(small.job.output.path) / f"part-{unit.id}.parquet" for unit in small.plan.units]
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_completions_are_bit_equal_however_the_prompts_lie_in_files(tmp_path: Path) -> None:
    """The units of ten files, of two files and of a range of one file have the same rows in the same order, and two of
    the prompts, in different units, cannot be used."""
    prompts: list[str | None] = pq.read_table(DEMO)["prompt"].to_pylist()[:ROWS]
    prompts[4], prompts[27] = None, ""
    rows, pieces = {}, {}
    for name, rows_a_file in PER_FILE.items():
        small = run(tmp_path / name, prompts, rows_a_file)
        pieces[name] = [len(spans_of(unit)) for unit in small.plan.units]
        found = rows_of(small)
        places = [(row["source_file"], row["source_row"]) for row in found]
        assert places == [
            (f"{2 * (row - row % rows_a_file) // ROWS}/{row - row % rows_a_file:02}.parquet", row % rows_a_file)
            for row in range(ROWS)
        ]
        assert [row["id"] for row in found] == [f"{file}#{number}" for file, number in places]
        rows[name] = [{column: row[column] for column in SAME} for row in found]
    assert pieces == {"thirty files": [10, 10, 10], "six files": [2, 2, 2], "one file": [1, 1, 1]}
    assert [row["prompt"] for row in rows["one file"] if row["error"] is None] == [text for text in prompts if text]
    assert len({row["completion"] for row in rows["one file"]}) > ROWS / 2
    assert rows["thirty files"] == rows["six files"] == rows["one file"]
