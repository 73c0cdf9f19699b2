"""Tests that a row is known by its file and its number together, wherever rows of several files lie side by side."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.types import Piece, WorkUnit
from pipeline.output.positions import positions

PIECES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=8)


def unit_of(spans: list[tuple[int, int]]) -> WorkUnit:
    return WorkUnit("u", tuple(Piece(f"/in/f{n}", f"f{n}", first, rows) for n, (first, rows) in enumerate(spans)))


def table_of(rows: list[tuple[str | None, int | None]]) -> pa.Table:
    files, numbers = [file for file, _ in rows], [number for _, number in rows]
    return pa.table({"source_file": pa.array(files, pa.string()), "source_row": pa.array(numbers, pa.int64())})


@given(
    spans=PIECES,
    rows=st.lists(st.tuples(st.none() | st.sampled_from([f"f{n}" for n in range(9)]), st.none() | st.integers(-2, 30))),
    chunk=st.integers(1, 5),
)
def test_a_position_is_that_of_the_row_in_its_piece(
    spans: list[tuple[int, int]], rows: list[tuple[str | None, int | None]], chunk: int
) -> None:
    unit = unit_of(spans)
    places = {(piece.name, row): index for index in range(unit.row_count) for piece, row in [unit.locate(index)]}
    expected = [places.get((file or "", -1 if row is None else row), -1) for file, row in rows]
    table = table_of(rows)
    assert positions(unit, table).tolist() == expected
    parts = [table.slice(start, chunk) for start in range(0, len(rows), chunk)]
    assert positions(unit, pa.concat_tables(parts) if parts else table).tolist() == expected
    for batch in table.to_batches():
        assert positions(unit, batch).tolist() == expected


@given(spans=PIECES, cut=st.tuples(st.integers(0, 80), st.integers(0, 80)))
def test_a_part_of_a_unit_has_the_same_rows_in_the_same_order(
    spans: list[tuple[int, int]], cut: tuple[int, int]
) -> None:
    unit = unit_of(spans)
    first, end = (min(each, unit.row_count) for each in sorted(cut))
    part = unit.part(first, end) if first < end else None
    rows = [(piece.name, row) for index in range(part.row_count) for piece, row in [part.locate(index)]] if part else []
    assert rows == [(piece.name, row) for index in range(first, end) for piece, row in [unit.locate(index)]]


def test_a_damaged_number_is_in_no_unit() -> None:
    unit = unit_of([(5, 3)])
    rows = table_of([("f0", 2**63 - 1), ("f0", -(2**63)), ("f0", 7)])
    assert positions(unit, rows).tolist() == [-1, -1, 2]
    assert positions(unit, rows.slice(0, 0)).dtype == np.int64


def test_a_unit_says_which_rows_it_holds() -> None:
    unit = WorkUnit("u", (Piece("/in/a", "a", 5, 3), Piece("/in/b", "b", 0, 1), Piece("/in/c", "c", 0, 9)))
    assert unit.describe() == "rows from a#5 to c#8, of 3 files"
    assert unit.describe(1, 3) == "a, rows 6 to 7"
    assert unit.describe(3, 4) == "b, rows 0 to 0"
    assert unit.describe(2, 4) == "rows from a#7 to b#0, of 2 files"
