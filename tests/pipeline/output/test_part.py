"""Tests of parts: their schema, their order and their totals, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.repetition import DEGENERATE
from pipeline.core.schema import RESULT_COLUMNS, output_schema
from pipeline.core.types import RowResult
from pipeline.input.unit_reader import UnitData
from pipeline.output.part import TOTALS_KEY, build_part, result_table
from tests.pipeline.cases import complete_row, make_job, plan_of, prompts, reader_of, write


def read_one(tmp_path: Path, section: dict[str, Any] | None = None, **columns: Any) -> UnitData:
    write(tmp_path / "in/a.parquet", **columns)
    job = make_job(tmp_path / "in", tmp_path / "out", input=section or {})
    return reader_of(job).read(plan_of(job).units[0])


def part(data: UnitData, schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    results = [complete_row(row) for row in reversed(data.rows)]
    written, totals = build_part(data, [result_table(data.unit, results)], schema, {"k": "v"})
    table = pq.read_table(pa.BufferReader(written))
    metadata = table.schema.metadata or {}
    assert metadata[b"k"] == b"v"
    stored = json.loads(metadata[TOTALS_KEY.encode()])
    assert stored["rows"] == totals.rows == table.num_rows
    return table, stored


def test_a_part_has_the_schema_and_the_order_of_the_input(tmp_path: Path) -> None:
    section = {"id_column": "doc", "carry": ["tags"]}
    data = read_one(
        tmp_path, section, prompt=["a", None, "c"], doc=pa.array([5, None, 5], pa.int16()), tags=[["x"], None, []]
    )
    table, totals = part(data, output_schema(pa.int16(), [pa.field("tags", pa.list_(pa.string()))]))
    assert table.column_names == ["id", "tags", *RESULT_COLUMNS]
    assert table.schema.field("id").type == pa.int16()
    assert table["id"].to_pylist() == [5, None, 5]
    assert table["tags"].to_pylist() == [["x"], None, []]
    assert table["completion"].to_pylist() == ["answer to a", None, "answer to c"]
    assert table["finish_reason"].to_pylist() == ["stop", "error", "stop"]
    assert table["error"].to_pylist() == [None, "prompt is null", None]
    assert table["tokens_per_forward"].to_pylist() == [1.5, None, 1.5]
    assert table["tokens_per_s"].to_pylist() == [6.0, None, 6.0]
    assert table["steps_per_block"].to_pylist() == [[2], [], [2]]
    assert table["blocks"].to_pylist() == [1, 0, 1]
    assert table["source_row"].to_pylist() == [0, 1, 2]
    assert set(table["source_file"].to_pylist()) == {"a.parquet"}
    assert totals["ok"] == 2
    assert (totals["errors"], totals["duplicate_ids"], totals["null_ids"]) == (1, 1, 1)
    assert (totals["completion_tokens"], totals["denoiser_forwards"]) == (6, 4)
    assert totals["finish_reasons"] == {"stop": 2, "error": 1}


def test_columns_that_are_all_null_keep_their_type(tmp_path: Path) -> None:
    """A part that has only good rows and one that has only bad rows have the same schema, so they can be read
    together."""
    schema = output_schema(pa.string(), [])
    good, _ = part(read_one(tmp_path, prompt=["a"]), schema)
    bad, _ = part(read_one(tmp_path, prompt=pa.array([None], pa.string())), schema)
    assert good.schema.remove_metadata() == bad.schema.remove_metadata() == schema


def test_a_part_is_refused_unless_every_row_is_there_once(tmp_path: Path) -> None:
    data = read_one(tmp_path, prompt=prompts(3))
    results = [complete_row(row) for row in data.rows]
    schema = output_schema(pa.string(), [])

    def build(*chosen: RowResult) -> None:
        build_part(data, [result_table(data.unit, chosen[:1]), result_table(data.unit, chosen[1:])], schema, {})

    with pytest.raises(ValueError, match=r"row a\.parquet#1 has no result"):
        build(results[0], results[2])
    with pytest.raises(ValueError, match="rows with more than one result: 1"):
        build(*results, results[0])
    done = dataclasses.replace(results[0].completion, key="a.parquet#7")
    with pytest.raises(ValueError, match="results that belong to no row: 1"):
        build(*results, dataclasses.replace(results[0], index=7, completion=done))
    swapped = [dataclasses.replace(results[0], index=1), dataclasses.replace(results[1], index=0), results[2]]
    with pytest.raises(ValueError, match=r"row a\.parquet#1 has the result of row a\.parquet#0"):
        build(*swapped)


def test_loops_are_counted(tmp_path: Path) -> None:
    data = read_one(tmp_path, prompt=["a", None, "c", "d"])
    shares = [DEGENERATE, None, DEGENERATE / 2, 1.0]
    rows = [
        dataclasses.replace(complete_row(row), repetition=share) for row, share in zip(data.rows, shares, strict=True)
    ]
    written, totals = build_part(data, [result_table(data.unit, rows)], output_schema(pa.string(), []), {})
    assert pq.read_table(pa.BufferReader(written))["repetition"].to_pylist() == shares
    assert totals.degenerate == 2
    assert (totals + totals).degenerate == 4
