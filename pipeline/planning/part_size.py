"""Estimates, from footers and settings alone, how many rows make a part of about `output.target_mb`.

The estimate is the same whenever the same file is planned with the same settings, so a resume finds the same units.
"""

from collections.abc import Collection

import pyarrow.parquet as pq

from pipeline.config.job import Job

ESTIMATE = "1"
"""Version of the estimate, part of the fingerprint: with other constants below, other units would be cut."""
MB = 1_000_000
STATISTICS_BYTES = 60.0
"""Bytes of a row beside its id, carried columns and completion, including its share of the footers; measured."""
TOKEN_BYTES = 1.0
"""Bytes of completion for each token of max_new_tokens: 4 bytes of text per token, 0.4 of them left by zstd, and
completions of 0.6 of the limit on average."""
STORED_SHARE = 0.4
"""Share of a column's bytes that zstd leaves, if the input holds the column uncompressed."""
MAX_ROWS = 1_000_000
"""Maximum rows of a unit, because a replica holds a unit's rows in memory."""


def measured_columns(job: Job) -> tuple[str, ...]:
    """Return the columns whose sizes a plan needs: the id and the carried columns, or none without output.target_mb."""
    if job.output.target_mb is None:
        return ()
    ids = (job.input.id_column,) if job.input.id_column else ()
    return (*ids, *job.input.carry)


def carried_bytes(metadata: pq.FileMetaData, columns: Collection[str], size: int) -> float:
    """Return the estimated bytes of these columns in the output, for all rows of a file of `size` bytes, from its
    footer."""
    total = 0.0
    for number in range(metadata.num_row_groups if columns else 0):
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            chunk = group.column(index)
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
                share = STORED_SHARE if chunk.compression == "UNCOMPRESSED" else 1.0
                total += share * max(0, chunk.total_compressed_size)
    return min(total, float(size))  # the footer may state wrong sizes


def rows_per_unit(job: Job, rows: int, carried: float) -> int:
    """Return the maximum rows of a unit, for an input file with `rows` rows and `carried` bytes in carried columns."""
    if job.output.rows_per_file is not None:
        return job.output.rows_per_file
    row_bytes = STATISTICS_BYTES + TOKEN_BYTES * job.generation.max_new_tokens + carried / max(rows, 1)
    return max(1, min(MAX_ROWS, int((job.output.target_mb or 0) * MB / row_bytes)))
