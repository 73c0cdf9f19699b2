"""A part as Parquet bytes, laid out for whatever reads it: DuckDB, Spark, Polars, pandas, Athena."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GROUP_ROWS, GROUP_BYTES = 100_000, 128 << 20
"""Of a row group at most, the bytes before encoding and by the mean row: what one task of a reader takes at a time."""
MOSTLY_UNIQUE = frozenset({"id", "completion", "mean_confidence", "queue_s", "latency_s", "tokens_per_s", "source_row"})
"""Columns without a dictionary: hardly a value stands twice, so it would be a second copy."""
NO_STATISTICS = frozenset({"completion"})
"""Nobody looks for a range of texts, and they would stand in the footer, which every resume reads."""


def encode_part(table: pa.Table) -> bytes:
    """The part's rows, which are in input order, with its schema's metadata, as one Parquet file.

    Pages carry checksums: damage of a page is found when it is read. Format and encodings are those that Spark 3 and
    Athena read: data pages of version 1, plain and dictionary encodings.
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
    """What the rows are sorted by: file and row always, the ids before them where that is true of this part."""
    ids = table["id"].combine_chunks()
    ascending = ids.null_count == 0 and pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py() is not False
    names = (["id"] if ascending else []) + ["source_file", "source_row"]
    return [(name, "ascending") for name in names]


def _group_rows(table: pa.Table) -> int:
    groups = max(table.num_rows / GROUP_ROWS, table.nbytes / GROUP_BYTES, 1)
    return max(1, math.ceil(table.num_rows / math.ceil(groups)))


def _leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """The paths of a column's leaves in the Parquet file: options go by them, and nested columns have several."""
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
