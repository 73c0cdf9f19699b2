"""The output's columns, explicit and versioned, and the types that its id and carried columns may have."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

_RESULT_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("completion", pa.string()),
    ("finish_reason", pa.string()),  # stop | length | error
    ("error", pa.string()),  # why finish_reason is error, else null
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("mode", pa.string()),
    ("denoiser_forwards", pa.int32()),
    ("tokens_per_forward", pa.float64()),  # null where there was no denoiser forward
    ("blocks", pa.int32()),
    ("steps_per_block", pa.list_(pa.int16())),
    ("forced_commits", pa.int32()),
    ("mean_confidence", pa.float64()),
    ("repetition", pa.float64()),  # null until the degeneration flag exists
    ("queue_s", pa.float64()),
    ("prefill_s", pa.float64()),
    ("denoise_s", pa.float64()),
    ("commit_s", pa.float64()),
    ("latency_s", pa.float64()),
    ("tokens_per_s", pa.float64()),  # null where latency_s is 0
    ("batch_rows", pa.float64()),
    ("attempt", pa.int32()),
    ("replica", pa.string()),
    ("source_file", pa.string()),
    ("source_row", pa.int64()),
)
RESULT_COLUMNS: tuple[str, ...] = tuple(name for name, _ in _RESULT_FIELDS)


def output_schema(id_type: pa.DataType, carried_fields: "Sequence[pa.Field[Any]]") -> pa.Schema:
    """The schema of every part: `id`, the carried columns in the job's order, then RESULT_COLUMNS."""
    return pa.schema([pa.field("id", id_type), *carried_fields, *(pa.field(n, t) for n, t in _RESULT_FIELDS)])


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type a column has in the output: encodings that writers choose freely (dictionary, large_, _view) are undone.

    So files written by different tools can be one input.
    """
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether the column holds strings, however encoded."""
    return bool(pa.types.is_string(plain_type(kind)))


def is_id(kind: pa.DataType) -> bool:
    """Whether the column can be an id: integers or strings."""
    return is_text(kind) or bool(pa.types.is_integer(plain_type(kind)))
