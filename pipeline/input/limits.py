"""What a Parquet file may promise, and how much of it is held at once: a few KB can claim, or decode to, any amount.

A footer is taken at its word where its numbers can be true. A file made by hand whose pages contradict its footer is
not caught here: pyarrow may take any amount of memory for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_COLUMNS = 20_000
MAX_CELL_BYTES = 64_000_000
"""Far above any prompt; a longer cell costs its row alone."""
UNIT_BYTES = 2 << 30
"""Of a unit's columns, and again of its prompts."""
ROW_BYTES = 256
"""What a row takes beside its cells."""
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 28
"""Decoded at once."""
SURELY_BYTES = 1 << 20
"""Row groups up to this size need no closer look: each of BATCH_ROWS rows could repeat all of it."""
MANY, PACKED = 1 << 27, 1000
"""So many values, and more than so many in a byte: nobody's data."""
RATIO = 100
"""Text is not compressed better than that."""
PAGE_HEADER_BYTES = 64


def check_footer(metadata: pq.FileMetaData, size: int) -> tuple[int, ...]:
    """The rows of each row group of a file of `size` bytes. Raises ValueError where the footer cannot be true."""
    if metadata.num_columns > MAX_COLUMNS:
        raise ValueError(f"it has {metadata.num_columns} columns, above the {MAX_COLUMNS} that are read")
    groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if any(rows < 0 for rows in groups) or sum(groups) != metadata.num_rows:
        raise ValueError(f"its footer promises {metadata.num_rows} rows but row groups of {sum(groups)}")
    _check_count(metadata.num_rows, size, "rows")
    return groups


def batch_rows(
    source: pa.NativeFile,
    metadata: pq.FileMetaData,
    groups: range,
    columns: Sequence[str],
    probe: Callable[[int], object],
) -> int:
    """How many rows of these row groups to decode at once: at most BATCH_BYTES, though a dictionary repeat its longest
    value. `probe` reads a row of a group: what pyarrow refuses then, it would crash at when asked about columns.

    Raises ValueError where the footer cannot be true, and what `probe` raises.
    """
    leaves = [
        index
        for index in range(metadata.num_columns)
        if any(f"{metadata.schema.column(index).path}.".startswith(f"{name}.") for name in columns)
    ]
    widest = 1
    for number in groups:
        group = metadata.row_group(number)
        if group.num_rows == 0 or 0 <= group.total_byte_size <= SURELY_BYTES:
            continue
        probe(number)
        widths = (
            _row_width(source, group.column(leaf), metadata.schema.column(leaf), group.num_rows) for leaf in leaves
        )
        widest = max(widest, sum(widths))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // widest))


def drop_long_cells(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, str]]:
    """The batch with cells above MAX_CELL_BYTES made null, and why, by row."""
    if batch.nbytes <= MAX_CELL_BYTES:
        return batch, {}
    errors: dict[int, str] = {}
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        sizes = [column.slice(index, 1).nbytes for index in range(len(column))]
        long = [size > MAX_CELL_BYTES for size in sizes]
        for index, size in enumerate(sizes):
            if long[index]:
                errors[index] = f"column '{name}' holds {size} bytes, above the {MAX_CELL_BYTES} of a cell"
        columns.append(pc.if_else(pa.array(long), pa.scalar(None, column.type), column) if any(long) else column)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema), errors


def _check_count(count: int, stored: int, noun: str) -> None:
    if count > MANY and count > PACKED * max(stored, 1):
        raise ValueError(f"its footer promises {count} {noun} in {stored} bytes")


def _row_width(source: pa.NativeFile, chunk: Any, leaf: Any, rows: int) -> int:
    """Bytes of the widest rows of a column chunk, nested ones as their mean."""
    _check_count(chunk.num_values, chunk.total_compressed_size, f"values of {leaf.path}")
    values: int = -(-chunk.num_values // max(rows, 1))
    width: int = max(8, leaf.length) if leaf.physical_type != "BYTE_ARRAY" else _widest(source, chunk)
    return values * width


def _widest(source: pa.NativeFile, chunk: Any) -> int:
    whole: int = chunk.total_uncompressed_size
    page = _page_bytes(source, chunk.dictionary_page_offset) if chunk.has_dictionary_page else 0
    if page > whole:
        raise ValueError(f"the dictionary of {chunk.path_in_schema} has {page} bytes, its footer says {whole} for all")
    rest = whole - page
    return max(page, rest if rest > RATIO * chunk.total_compressed_size else 2 * rest // max(chunk.num_values, 1))


def _page_bytes(source: pa.NativeFile, offset: int) -> int:
    """The uncompressed size in the page header there: field 2, after the type, in Thrift's compact protocol."""
    source.seek(offset)
    header = source.read(PAGE_HEADER_BYTES)
    if len(header) < 3 or header[0] != 0x15 or header[2] != 0x15:
        raise ValueError(f"there is no page at byte {offset}")
    number = shift = 0
    for byte in header[3:8]:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number >> 1
