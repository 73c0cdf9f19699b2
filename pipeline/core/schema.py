"""Defines the columns of the output and their version, and converts types of input columns to types of the output."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
"""The version of RESULT_COLUMNS and their types. It is part of the fingerprint, of each commit record and of each
segment."""

_RESULT_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("completion", pa.string()),
    ("finish_reason", pa.string()),  # stop | length | error
    ("error", pa.string()),  # the reason if finish_reason is error, else null
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("mode", pa.string()),
    ("denoiser_forwards", pa.int32()),
    ("tokens_per_forward", pa.float64()),  # null if there was no denoiser forward
    ("blocks", pa.int32()),
    ("steps_per_block", pa.list_(pa.int16())),
    ("forced_commits", pa.int32()),
    ("mean_confidence", pa.float64()),
    ("repetition", pa.float64()),  # null for error rows without tokens
    ("queue_s", pa.float64()),
    ("prefill_s", pa.float64()),
    ("denoise_s", pa.float64()),
    ("commit_s", pa.float64()),
    ("latency_s", pa.float64()),
    ("tokens_per_s", pa.float64()),  # null if latency_s is 0
    ("batch_rows", pa.float64()),
    ("attempt", pa.int32()),
    ("replica", pa.string()),
    ("source_file", pa.string()),
    ("source_row", pa.int64()),
)
RESULT_COLUMNS: tuple[str, ...] = tuple(name for name, _ in _RESULT_FIELDS)
RESULT_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in _RESULT_FIELDS])
"""The columns of a segment. A part has the id and the carried columns before them."""


PROMPT_COLUMN = "prompt"
"""The column with the text of the prompts, if the job keeps them (output.keep_prompt)."""


def output_schema(
    id_type: pa.DataType, carried_fields: "Sequence[pa.Field[Any]]", *, keep_prompt: bool = False
) -> pa.Schema:
    """Return the schema of every part: `id`, the carried columns in the job's order, PROMPT_COLUMN if the prompts are
    kept, then RESULT_COLUMNS."""
    kept = [pa.field(PROMPT_COLUMN, pa.string())] if keep_prompt else []
    return pa.schema([pa.field("id", id_type), *carried_fields, *kept, *RESULT_SCHEMA])


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the Arrow type that an input column of type `kind` gets in the output.

    Dictionary, large_ and _view types, also nested ones, become the type of their values without these, and nested
    fields may be null. These details depend on the tool that wrote a file, so files of different tools can form one
    input.
    """
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        fixed: pa.DataType = pa.list_(plain_type(kind.value_type), kind.list_size)
        return fixed
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def merge_types(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return a type for a column that has type `one` in one file and `other` in another; None if there is none.

    Both must be results of plain_type. The types must be equal, but a null type fits any other one, also as the type of
    a list's items or of a struct's field.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = merge_types(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other) and one.names == other.names:
        fields = [(a.name, merge_types(a.type, b.type)) for a, b in zip(one, other, strict=True)]
        merged = [pa.field(name, inner) for name, inner in fields if inner is not None]
        return pa.struct(merged) if len(merged) == len(fields) else None
    return None


def cast_column(column: Any, kind: pa.DataType) -> Any:
    """Return the column, an Array or a ChunkedArray, with this type, which its values must fit."""
    # pyarrow fails to cast a slice of structs with a null field to its own type.
    return column if column.type == kind else column.cast(kind)


def concat_columns(tables: "Sequence[pa.Table]") -> pa.Table:
    """Return the rows of tables that have the same columns one after the other.

    The types of a column may differ as merge_types allows; pyarrow's own promotion would refuse structs in which a name
    occurs twice. Raises ValueError, which names the column, if the types of one do not fit.
    """
    schema = tables[0].schema
    if all(table.schema.equals(schema) for table in tables):
        return pa.concat_tables(tables)
    types = {field.name: field.type for field in schema}
    for table in tables:
        for field in table.schema:
            merged = merge_types(types[field.name], field.type)
            if merged is None:
                raise ValueError(f"column '{field.name}' is {types[field.name]} in one file, {field.type} in another")
            types[field.name] = merged
    return pa.concat_tables(
        pa.table({name: cast_column(table.column(name), kind) for name, kind in types.items()}) for table in tables
    )


def text_type(kind: pa.DataType) -> pa.DataType:
    """Return string for a column of bytes, and plain_type(kind) for any other one.

    Spark and Impala may write strings as bytes without saying that they are strings, so bytes are taken for UTF-8 text
    where text is wanted.
    """
    plain = plain_type(kind)
    return pa.string() if pa.types.is_binary(plain) else plain


def depth_of(kind: pa.DataType) -> int:
    """Return how many types are nested in each other: 1 for a plain type, 2 for a list of numbers."""
    depth, types = 0, [kind]
    while types:
        depth += 1
        types = [each.field(index).type for each in types for index in range(each.num_fields)]
    return depth


def is_messages(kind: pa.DataType) -> bool:
    """Return True if a column of this type holds the messages of chats: lists of structs with role and content."""
    plain = plain_type(kind)
    if not pa.types.is_list(plain) or not pa.types.is_struct(plain.value_type):
        return False
    return {"role", "content"} <= {field.name for field in plain.value_type}


def is_text(kind: pa.DataType) -> bool:
    """Return True if a column of this type holds strings: string, large_string, string_view or a dictionary of them."""
    return bool(pa.types.is_string(plain_type(kind)))


def is_id(kind: pa.DataType) -> bool:
    """Return True if a column of this type can be the id column: it holds integers or strings (see is_text)."""
    return is_text(kind) or bool(pa.types.is_integer(plain_type(kind)))
