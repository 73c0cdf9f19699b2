"""Limits how much of a Parquet file is in memory at once, and refuses footers whose numbers cannot be true.

These checks are needed because a file of a few KB can claim to hold, or can decode to, any amount of data. A footer
whose numbers can be true is trusted. A handmade file whose pages contradict its footer is therefore not detected:
pyarrow may use any amount of memory for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_COLUMNS = 20_000
"""The most columns that a file may have; a nested column counts once per leaf."""
MAX_CELL_BYTES = 64_000_000
"""The largest size of a cell in bytes, far above any prompt. A larger cell makes only its own row an error row."""
UNIT_BYTES = 2 << 30
"""The most bytes of memory for the columns of a unit, and the most characters of all its prompts together."""
ROW_BYTES = 256
"""The bytes of memory that a row is assumed to need beside its cells."""
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 28
"""The most rows, and the most bytes, to decode at once."""
SURELY_BYTES = 1 << 20
"""The bytes up to which a row group is not examined: even if each of BATCH_ROWS rows repeated all of the group's data,
a batch would take at most BATCH_ROWS times this size (1 GiB)."""
MANY, PACKED = 1 << 27, 1000
"""A footer is refused if it states more than MANY rows or values and more than PACKED of them per stored byte: no real
data is so dense."""
RATIO = 100
"""The highest compression ratio that is expected of text. Data with a higher one may be a single huge value."""
PAGE_HEADER_BYTES = 64
"""The bytes that are read of a page header; its first two fields are within them."""


def check_footer(metadata: pq.FileMetaData, size: int) -> tuple[int, ...]:
    """Check the row counts in a footer and return the number of rows in each row group. `size`: the bytes of the file.

    Raises ValueError if the numbers cannot be true or the file has more than MAX_COLUMNS columns.
    """
    if metadata.num_columns > MAX_COLUMNS:
        raise ValueError(f"it has {metadata.num_columns} columns, above the limit of {MAX_COLUMNS}")
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
    """Return how many rows of these row groups to decode at once, so that a batch stays within BATCH_BYTES.

    It does so even if every row repeats the longest value of a dictionary. Row groups up to SURELY_BYTES are not
    examined. `columns`: the names of the columns to read. `probe` reads one row of the row group with a given number.
    It is called first because pyarrow would crash on the column metadata of a group that it cannot read.

    Raises ValueError if the footer cannot be true, and whatever `probe` raises.
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
    """Return the batch with cells above MAX_CELL_BYTES set to null, and the reason for each row with such a cell, by
    its position in the batch."""
    if batch.nbytes <= MAX_CELL_BYTES:
        return batch, {}
    errors: dict[int, str] = {}
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        sizes = [column.slice(index, 1).nbytes for index in range(len(column))]
        long = [size > MAX_CELL_BYTES for size in sizes]
        for index, size in enumerate(sizes):
            if long[index]:
                errors[index] = f"column '{name}' holds {size} bytes, above the limit of {MAX_CELL_BYTES} for a cell"
        columns.append(pc.if_else(pa.array(long), pa.scalar(None, column.type), column) if any(long) else column)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema), errors


def _check_count(count: int, stored: int, noun: str) -> None:
    if count > MANY and count > PACKED * max(stored, 1):
        raise ValueError(f"its footer promises {count} {noun} in {stored} bytes")


def _row_width(source: pa.NativeFile, chunk: Any, leaf: Any, rows: int) -> int:
    """Return the estimated bytes of the widest row of a column chunk.

    A row of a nested column counts as the mean number of values per row, each as wide as the widest. `leaf`: the schema
    of the column. `rows`: the rows of its row group.
    """
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
    """Return the uncompressed size in bytes that the page header at byte `offset` of the file states.

    The size is field 2 of the header, after the page type, in Thrift's compact protocol. Raises ValueError if there is
    no page header.
    """
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
