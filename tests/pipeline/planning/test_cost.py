"""Tests of the order of units: those with the most work, as footers and settings tell, are handed out first."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.events import ReplicaReady
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.work_queue import WorkQueue
from pipeline.planning.cost import BYTES_A_TOKEN, ExpectedWork, prompt_bytes
from pipeline.planning.packing import spans_of
from tests.pipeline.cases import make_job, one_piece, plan_of, write


def order_of(*work: float) -> list[str]:
    """Return the ids of units with this expected work in the order in which they are handed out; u0 was planned
    first."""
    units = [one_piece(f"u{n}", "/in/a", "a", n, 1, expected_work=each) for n, each in enumerate(work)]
    queue = WorkQueue(units, {}, RetryPolicy(3, 0.1))
    for replica in range(len(units)):
        queue.take(ReplicaReady(f"r{replica}"))
    return [given_out.unit.id for _, given_out in queue.hand_out()]


def test_units_go_out_longest_first_and_equal_ones_as_planned() -> None:
    assert order_of(2.0, 5.0, 1.0, 5.0, 2.0) == ["u1", "u3", "u0", "u4", "u2"]
    assert order_of(0.0, 0.0, 0.0) == ["u0", "u1", "u2"]


@given(
    groups=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1000)), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 120), max_size=5),
)
def test_the_work_of_pieces_adds_up_to_that_of_the_file(groups: list[tuple[int, int]], cuts: list[int]) -> None:
    """This holds however a file is cut, also with empty row groups."""
    rows, sizes = [rows for rows, _ in groups], [size if rows else 0 for rows, size in groups]
    work, total = ExpectedWork(rows, sizes, max_new_tokens=7), sum(rows)
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    pieces = [work.of(first, end - first) for first, end in pairwise(edges)]
    assert sum(pieces) == pytest.approx(7 * total + sum(sizes) / BYTES_A_TOKEN)
    assert all(piece >= 0 for piece in pieces)


def test_long_prompts_are_more_work_whatever_else_the_rows_carry(tmp_path: Path) -> None:
    """This holds between the row groups of a file and between files. Columns that are not part of a prompt do not
    count."""
    write(tmp_path / "in/a.parquet", prompt=["short"] * 10 + [f"{i:0400}" for i in range(10)], group=10)
    write(tmp_path / "in/b.parquet", prompt=["tiny"] * 10, blob=[f"{i:09000}" for i in range(10)], group=10)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in/c.parquet")
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 10}, generation={"max_new_tokens": 8})
    plan = plan_of(job)
    assert [spans_of(unit)[0][:2] for unit in plan.units] == [
        ("a.parquet", 0),
        ("a.parquet", 10),
        ("b.parquet", 0),
    ]
    short, long, other = (unit.expected_work for unit in plan.units)
    assert long > 10 * short
    assert other == pytest.approx(short, rel=0.2)
    assert plan_of(job).units == plan.units


def test_all_columns_of_a_template_count_nested_ones_too(tmp_path: Path) -> None:
    """A column whose name only begins like one of them does not count."""
    file = write(tmp_path / "a.parquet", turns=[[{"text": f"{i:0500}"}] for i in range(9)], turns2=["x" * 900] * 9)
    metadata = pq.read_metadata(file)
    nested, other = prompt_bytes(metadata, ["turns"]), prompt_bytes(metadata, ["turns2"])
    assert nested[0] > 9 * 500 > other[0]
    assert prompt_bytes(metadata, ["turns", "turns2"]) == (nested[0] + other[0],)
    assert prompt_bytes(metadata, []) == (0,)
