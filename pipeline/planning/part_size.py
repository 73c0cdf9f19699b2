"""Says, from footers and settings alone, how many rows may be in a part: `output.rows_per_file`, or an estimate of how
many make a part of about `output.target_mb`.

The estimate is the same whenever the same file is planned with the same settings, so a resume finds the same units.
"""

import math
from collections.abc import Collection
from itertools import chain

import pyarrow.parquet as pq

from pipeline.config.job import Job
from pipeline.planning.cost import chunks_of, prompt_columns

ESTIMATE = "1"
"""The version of the estimate, which is part of the fingerprint. It must change with each constant below, because then
other units are cut."""
MB = 1_000_000
STATISTICS_BYTES = 60.0
"""The bytes of a row in a part beside its id, carried columns and completion, including its share of the footer;
measured."""
TOKEN_BYTES = 1.0
"""The bytes of a completion in a part per token of max_new_tokens. It assumes 4 bytes of text per token, of which zstd
leaves 0.4, and completions with 0.6 of the allowed tokens on average."""
STORED_SHARE = 0.4
"""The share (0 to 1) of a column's bytes that zstd leaves in the part, if the input holds the column uncompressed."""
MAX_ROWS = 1_000_000
"""The most rows of a unit whose size follows from output.target_mb, because a replica holds a unit's rows in memory."""


def measured_columns(job: Job) -> tuple[str, ...]:
    """Return the input columns whose sizes the estimate needs: the id column, the carried columns and, if the output
    keeps the prompts, those that they are made of. Returns none if output.target_mb is null."""
    if job.output.target_mb is None:
        return ()
    ids = (job.input.id_column,) if job.input.id_column else ()
    prompts = prompt_columns(job.input) if job.output.keep_prompt else ()
    return (*ids, *job.input.carry, *prompts)


def carried_bytes(metadata: pq.FileMetaData, columns: Collection[str], size: int) -> float:
    """Return the estimated bytes that these columns of a whole input file take in the output, from the file's footer.

    `size`: the bytes of the file, which the result does not exceed.
    """
    if not columns:
        return 0.0
    total = 0.0
    for chunk in chain.from_iterable(chunks_of(metadata, columns)):
        share = STORED_SHARE if chunk.compression == "UNCOMPRESSED" else 1.0
        total += share * max(0, chunk.total_compressed_size)
    return min(total, float(size))  # the footer may state wrong sizes


def rows_per_unit(job: Job, rows: int, carried: float) -> int:
    """Return the most rows of a unit of one input file: output.rows_per_file, or the estimate for output.target_mb.

    `rows`: the rows of the file. `carried`: the result of carried_bytes.
    """
    if job.output.rows_per_file is not None:
        return job.output.rows_per_file
    row_bytes = part_bytes(job, 1, carried / max(rows, 1))
    return max(1, min(MAX_ROWS, int((job.output.target_mb or 0) * MB / row_bytes)))


def part_bytes(job: Job, rows: int, carried: float) -> float:
    """Return the estimated bytes that rows take in a part. `carried`: the result of carried_bytes for these rows."""
    return rows * (STATISTICS_BYTES + TOKEN_BYTES * job.generation.max_new_tokens) + carried


def part_limits(job: Job) -> tuple[int, float]:
    """Return the most rows and the most estimated bytes (part_bytes) of a unit with rows of several files."""
    if job.output.rows_per_file is not None:
        return job.output.rows_per_file, math.inf
    return MAX_ROWS, (job.output.target_mb or 0) * MB
