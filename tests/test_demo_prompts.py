"""Tests that the shipped demo prompts are what the shipped program writes, and that they are varied."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

JOBS = Path(__file__).parents[1] / "jobs"


def test_the_shipped_file_is_what_the_program_makes(tmp_path: Path) -> None:
    made = tmp_path / "made.parquet"
    subprocess.run([sys.executable, str(JOBS / "demo_prompts.py"), str(made)], cwd=tmp_path, check=True)
    assert pq.read_table(JOBS / "demo_prompts.parquet").equals(pq.read_table(made))


def test_they_are_many_and_varied() -> None:
    table = pq.read_table(JOBS / "demo_prompts.parquet")
    prompts: list[Any] = table["prompt"].to_pylist()
    lengths = sorted(len(prompt) for prompt in prompts)
    assert len(set(prompts)) == len(set(table["id"].to_pylist())) == len(prompts) >= 500
    assert len(set(table["task"].to_pylist())) >= 5
    assert lengths[0] < 40
    assert lengths[-1] > 300
    assert pq.read_metadata(JOBS / "demo_prompts.parquet").num_row_groups > 3
