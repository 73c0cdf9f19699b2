"""The demo's prompts: the shipped file is what the shipped program writes, and is as varied as it claims."""

import runpy
from pathlib import Path

import pyarrow.parquet as pq

JOBS = Path(__file__).parents[2] / "jobs"


def test_the_shipped_file_is_what_the_program_makes() -> None:
    made = runpy.run_path(str(JOBS / "demo_prompts.py"))["make_prompts"]()
    assert pq.read_table(JOBS / "demo_prompts.parquet").equals(made)


def test_they_are_many_and_varied() -> None:
    table = pq.read_table(JOBS / "demo_prompts.parquet")
    prompts = table["prompt"].to_pylist()
    lengths = sorted(len(prompt.encode()) for prompt in prompts)
    assert len(set(prompts)) == len(set(table["id"].to_pylist())) == len(prompts) >= 500
    assert len(set(table["topic"].to_pylist())) >= 5
    assert lengths[0] < 20
    assert lengths[-1] > 2000
    assert lengths[-1] <= 2500
    assert 120 < sum(lengths) / len(lengths) < 180
    assert pq.read_metadata(JOBS / "demo_prompts.parquet").num_row_groups > 3
