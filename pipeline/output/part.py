"""Builds parts: Parquet bytes with the results of a work unit and its id and carried columns."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.requests import Completion
from pipeline.core.repetition import DEGENERATE
from pipeline.core.schema import PROMPT_COLUMN, RESULT_COLUMNS, RESULT_SCHEMA, cast_column
from pipeline.core.types import RowResult, Totals, WorkUnit
from pipeline.input.unit_reader import UnitData
from pipeline.output.positions import positions

TOTALS_KEY = "twotower.totals"
"""The key of a part's totals in the key-value metadata of the Parquet file."""


def row_key(unit: WorkUnit, index: int) -> str:
    """Return the key of the row at position `index` (from 0) of the unit: `<input file>#<row number in the file>`."""
    piece, source_row = unit.locate(index)
    return f"{piece.name}#{source_row}"


def result_table(unit: WorkUnit, results: Sequence[RowResult]) -> pa.Table:
    """Return finished rows of a unit as a table with RESULT_SCHEMA, in the order given.

    The id, the carried columns and the prompts are added later, by build_part. Raises ValueError if the key of a
    completion is not the key of the row at result.index, which is a mistake of the caller.
    """
    columns: dict[str, list[Any]] = {name: [] for name in RESULT_COLUMNS}
    for result in results:
        piece, source_row = unit.locate(result.index)
        key = f"{piece.name}#{source_row}"
        if result.completion.key != key:
            raise ValueError(f"unit {unit.id}: row {key} has the result of row {result.completion.key}")
        own = {name: getattr(result, name) for name in ("mode", "attempt", "replica", "repetition")}
        for name, value in {**_result_row(result.completion), **own}.items():
            columns[name].append(value)
        columns["source_file"].append(piece.name)
        columns["source_row"].append(source_row)
    return pa.table(columns, schema=RESULT_SCHEMA)


def build_part(
    data: UnitData, finished: Sequence[pa.Table], schema: pa.Schema, header: dict[str, str]
) -> tuple[bytes, Totals]:
    """Return (the bytes of a unit's part, its totals). The rows of the part are in input order.

    `data` gives the unit with its id and carried columns, and its prompts if they are kept. `finished` are tables made
    by result_table, which together hold every row of the unit once, in any order. `schema`: that of every part.
    `header` goes into the key-value metadata of the file, and the totals are added to it. Raises ValueError if a row is
    missing, repeated or not in the unit: this is a mistake of the caller, and nothing may be published then.
    """
    results = _in_order(data.unit, pa.concat_tables([RESULT_SCHEMA.empty_table(), *finished]))
    # A column, or a nested field, that is all null in these input files may have a type in other files.
    columns: dict[str, Any] = {
        name: cast_column(data.columns.column(name), schema.field(name).type) for name in data.columns.column_names
    }
    ids = columns["id"]
    repeated = len(ids) - ids.null_count - pc.count_distinct(ids).as_py()
    totals = tally(results) + Totals(duplicate_ids=repeated, null_ids=ids.null_count)
    columns |= {name: results[name] for name in RESULT_COLUMNS}
    metadata = {**header, TOTALS_KEY: json.dumps(asdict(totals))}
    table = pa.table([columns[field.name] for field in schema], schema=schema)
    return encode_part(table.replace_schema_metadata(metadata)), totals


def to_parquet(table: pa.Table) -> bytes:
    """Return the table as the bytes of a Parquet file that is not a part, such as a segment (for parts: encode_part).

    It has page checksums, which reveal damaged pages when they are read.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def tally(results: pa.Table | pa.RecordBatch) -> Totals:
    """Return the totals of rows with RESULT_COLUMNS. `duplicate_ids` and `null_ids` are 0, as ids are not looked at."""
    reasons = dict(Counter(map(str, results["finish_reason"].to_pylist())))
    errors = reasons.get("error", 0)
    return Totals(
        rows=results.num_rows,
        ok=results.num_rows - errors,
        errors=errors,
        prompt_tokens=_sum(results["prompt_tokens"]),
        completion_tokens=_sum(results["completion_tokens"]),
        denoiser_forwards=_sum(results["denoiser_forwards"]),
        degenerate=_sum(pc.greater_equal(results["repetition"], pa.scalar(DEGENERATE))),
        finish_reasons=reasons,
    )


def _sum(column: "pa.Array[Any] | pa.ChunkedArray[Any]") -> int:
    return int(pc.sum(column).as_py() or 0)


def _in_order(unit: WorkUnit, results: pa.Table) -> pa.Table:
    """Return the results in the order of the unit. Raises ValueError unless each row has exactly one result."""
    found = positions(unit, results)
    order = np.argsort(found, kind="stable")
    inside = found[found >= 0]
    if repeated := len(inside) - len(np.unique(inside)):
        raise ValueError(f"unit {unit.id}: rows with more than one result: {repeated}")
    missing = np.setdiff1d(np.arange(unit.row_count), inside)
    if len(missing):
        raise ValueError(f"unit {unit.id}: row {row_key(unit, int(missing[0]))} has no result")
    if strange := len(found) - len(inside):
        raise ValueError(f"unit {unit.id}: results that belong to no row: {strange}")
    return results.take(order)


def _result_row(done: Completion) -> dict[str, Any]:
    """Return the values of the RESULT_COLUMNS that follow from the completion alone, by column."""
    tokens = len(done.token_ids)
    return {
        "completion": done.text,
        "finish_reason": done.finish_reason,
        "error": done.error,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": tokens,
        "denoiser_forwards": done.denoiser_forwards,
        "tokens_per_forward": tokens / done.denoiser_forwards if done.denoiser_forwards else None,
        "blocks": len(done.steps_per_block),
        "steps_per_block": list(done.steps_per_block),
        "forced_commits": done.forced_commits,
        "mean_confidence": done.mean_confidence,
        "queue_s": done.queue_s,
        "prefill_s": done.prefill_s,
        "denoise_s": done.denoise_s,
        "commit_s": done.commit_s,
        "latency_s": done.latency_s,
        "tokens_per_s": tokens / done.latency_s if done.latency_s > 0 else None,
        "batch_rows": done.batch_rows,
    }


GROUP_ROWS, GROUP_BYTES = 100_000, 128 << 20
"""The most rows and the most bytes in a row group, which one task of a reader takes at a time. The bytes are counted
before encoding, as if all rows were of mean size."""

MOSTLY_UNIQUE = frozenset(
    {
        *("id", PROMPT_COLUMN, "completion", "source_row"),
        *("mean_confidence", "queue_s", "latency_s", "tokens_per_s"),
    }
)
"""The columns that are written without a dictionary: hardly any value occurs twice, so a dictionary would be a second
copy of the column."""

NO_STATISTICS = frozenset({PROMPT_COLUMN, "completion"})
"""The columns that are written without statistics: nobody selects texts by range, and the statistics would enlarge the
footer, which every resume reads."""


def encode_part(table: pa.Table) -> bytes:
    """Return the bytes of a part with these rows, which must be in input order, and with the metadata of their schema.

    Page checksums reveal damaged pages when they are read. Spark 3 and Athena can read the file, because it has only
    data pages of version 1 with plain and dictionary encodings.
    """
    leaves = [(field.name, leaf) for field in table.schema for leaf in _leaves(field.name, field.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=_group_rows(table),
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        use_dictionary=[leaf for column, leaf in leaves if column not in MOSTLY_UNIQUE],  # type: ignore[arg-type]
        write_statistics=[leaf for column, leaf in leaves if column not in NO_STATISTICS],
        write_page_index=True,
        write_page_checksum=True,
        sorting_columns=pq.SortingColumn.from_ordering(table.schema, _order(table)),
    )
    return sink.getvalue().to_pybytes()


def _order(table: pa.Table) -> Sequence[tuple[str, Literal["ascending"]]]:
    """Return the sort order of the rows: file and row, preceded by the id if the ids of this part are ascending."""
    ids, files = table["id"].combine_chunks(), list(map(str, table["source_file"].unique().to_pylist()))
    ascending = ids.null_count == 0 and pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py() is not False
    names = ["id"] if ascending else []
    if files == sorted(files):
        names += ["source_file", "source_row"]
    return [(name, "ascending") for name in names]


def _group_rows(table: pa.Table) -> int:
    """Return the number of rows per row group: as few groups of about equal size as the two limits allow."""
    groups = max(table.num_rows / GROUP_ROWS, table.nbytes / GROUP_BYTES, 1)
    return max(1, math.ceil(table.num_rows / math.ceil(groups)))


def _leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Yield the paths of a column's leaves in the Parquet file; a nested column may have several. The options of the
    writer name leaves, not columns."""
    if pa.types.is_map(kind):
        yield from _leaves(f"{path}.key_value.key", kind.key_type)
        yield from _leaves(f"{path}.key_value.value", kind.item_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        inner: Any = kind.value_type
        yield from _leaves(f"{path}.list.element", inner)
    else:
        yield path
