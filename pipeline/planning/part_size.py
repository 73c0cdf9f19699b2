"""How many rows make a part of about `output.target_mb`: an estimate, from footers and settings alone.

It is the same whenever the same file is planned with the same settings, so a resume finds the same units.
"""

from collections.abc import Collection

import pyarrow.parquet as pq

from pipeline.config.job import Job

ESTIMATE = "1"
"""Goes into the fingerprint: other numbers below cut other units."""
MB = 1_000_000
STATISTICS_BYTES = 60.0
"""What a row takes beside its id, its carried columns and its completion, and what footers add; measured."""
TOKEN_BYTES = 1.0
"""For each of max_new_tokens: 4 bytes of text, 0.4 of them left by zstd, completions of 0.6 of the limit on average."""
STORED_SHARE = 0.4
"""What zstd leaves of a column that the input holds uncompressed."""
MAX_ROWS = 1_000_000
"""A replica holds a unit's rows in memory."""


def measured_columns(job: Job) -> tuple[str, ...]:
    """The columns whose sizes a plan needs: the id and what is carried, where parts are to have a size."""
    if job.output.target_mb is None:
        return ()
    ids = (job.input.id_column,) if job.input.id_column else ()
    return (*ids, *job.input.carry)


def carried_bytes(metadata: pq.FileMetaData, columns: Collection[str], size: int) -> float:
    """Bytes of these columns in the output, all rows of an input file of `size` bytes together, by its footer."""
    total = 0.0
    for number in range(metadata.num_row_groups if columns else 0):
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            chunk = group.column(index)
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
                share = STORED_SHARE if chunk.compression == "UNCOMPRESSED" else 1.0
                total += share * max(0, chunk.total_compressed_size)
    return min(total, float(size))  # a footer may say anything


def rows_per_unit(job: Job, rows: int, carried: float) -> int:
    """Rows of a unit at most, for an input file of `rows` rows whose carried columns take so many bytes."""
    if job.output.rows_per_file is not None:
        return job.output.rows_per_file
    row_bytes = STATISTICS_BYTES + TOKEN_BYTES * job.generation.max_new_tokens + carried / max(rows, 1)
    return max(1, min(MAX_ROWS, int((job.output.target_mb or 0) * MB / row_bytes)))
