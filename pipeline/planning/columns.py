"""Checks that every input file has the columns that the job reads, and derives the schema of the parts from them."""

import pyarrow as pa

from pipeline.config.job import InputSection
from pipeline.core.errors import InputError
from pipeline.core.schema import (
    RESULT_COLUMNS,
    depth_of,
    is_id,
    is_messages,
    is_text,
    merge_types,
    output_schema,
    plain_type,
    text_type,
)
from pipeline.input.row_settings import misfit
from pipeline.planning.footers import Footer, distinct
from pipeline.planning.prompts import template_advice
from pipeline.prompts.setup import PromptSetup
from pipeline.storage.storage import FileInfo

_OTHER_SOURCES = ": set input.prompt_column, input.template or input.messages_column"
MAX_DEPTH = 50
"""The most levels of nested types in a column that prompts are made of. Arrow cannot send more than 64 to the process
that renders templates."""


def check_columns(
    settings: InputSection, setup: PromptSetup, footers: list[tuple[FileInfo, Footer]], *, keep_prompt: bool = False
) -> pa.Schema:
    """Return the schema of the parts, from the schemas of all input files.

    Raises InputError if a column that the job reads is missing, is in a file twice, has a wrong type or has different
    types in two files, if the column of the prompts, the messages or the ids is null in every file, or if a carried
    column is named twice or like a column of the output.
    """
    _check_names(settings)
    single = settings.prompt_column or settings.messages_column
    others = dict.fromkeys([*settings.carry, *settings.row_settings.columns.values()])
    types: dict[str, tuple[pa.DataType, str]] = {}
    for info, footer in distinct(footers):
        for name in settings.columns_with(setup.columns):
            kind = _column_type(info.name, footer.schema, name, settings)
            if name in setup.columns and (depth := depth_of(kind)) > MAX_DEPTH:
                raise InputError(
                    f"{info.name}: column '{name}' is nested {depth} levels deep; prompts can be made of {MAX_DEPTH}"
                )
            if name not in others:
                if name not in (single, settings.id_column):  # a template can use any type
                    continue
                kind = text_type(kind)
            first, first_file = types.setdefault(name, (kind, info.name))
            merged = merge_types(first, kind)  # a column that is all null in one file fits any type
            if merged is None:
                raise InputError(
                    f"column '{name}' is {first} in {first_file} but {kind} in {info.name}: make them one type"
                )
            types[name] = (merged, first_file if merged == first else info.name)
    for role, used in ((settings.prompt_source.removesuffix("_column"), single), ("id", settings.id_column)):
        if used and pa.types.is_null(types[used][0]):
            needed = {"id": "a string type or integers", "messages": "lists of messages"}.get(role, "a string type")
            raise InputError(f"{role} column '{used}' is null in every file: it must have values, of {needed}")
    id_type = text_type(types[settings.id_column][0]) if settings.id_column else pa.string()
    carried = [pa.field(name, types[name][0]) for name in settings.carry]
    return output_schema(id_type, carried, keep_prompt=keep_prompt)


def _check_names(settings: InputSection) -> None:
    taken = {"id", *RESULT_COLUMNS}
    seen: set[str] = set()
    for name in settings.carry:
        if name.casefold() in taken:  # readers such as DuckDB do not distinguish ID from id
            raise InputError(
                f"input.carry: column '{name}' would collide with the output's own column {name.casefold()}"
            )
        if name.casefold() in seen:
            raise InputError(f"input.carry: column '{name}' is carried twice")
        seen.add(name.casefold())


def _column_type(file: str, schema: pa.Schema, name: str, settings: InputSection) -> pa.DataType:
    where = schema.get_all_field_indices(name)
    if len(where) != 1:
        if where:
            raise InputError(f"{file}: column '{name}' is in the file {len(where)} times; rename or drop all but one")
        roles = {column: f"row_settings.{setting}" for setting, column in settings.row_settings.columns.items()}
        roles |= dict.fromkeys(settings.carry, "carry")
        roles |= {getattr(settings, role) or "": role for role in ("prompt_column", "messages_column", "id_column")}
        text = (
            f"no column '{name}' (input.{roles[name]})" + _OTHER_SOURCES * (roles[name] == "prompt_column")
            if name in roles
            else f"the template reads column '{name}', which is not there"
        )
        raise InputError(f"{file}: {text}; its columns: {', '.join(schema.names) or 'none'}")
    kind = schema.field(name).type
    if pa.types.is_null(kind):
        return kind
    if name == settings.prompt_column and not is_text(text_type(kind)):
        if is_messages(kind):
            raise InputError(
                f"{file}: prompt column '{name}' is {kind}: it holds messages. Set input.messages_column if the "
                "checkpoint has a chat template, or use this template:",
                advice=template_advice(name),
            )
        raise InputError(
            f"{file}: prompt column '{name}' is {kind}: it must hold strings or bytes; "
            f"input.template can print it, as {{{{ {name} }}}} does"
        )
    if name == settings.messages_column and not (is_messages(kind) or is_text(text_type(kind))):
        raise InputError(
            f"{file}: messages column '{name}' is {kind}: it must hold lists of structs with role and content, or such "
            "lists as JSON text"
        )
    if name == settings.id_column and not is_id(text_type(kind)):
        raise InputError(f"{file}: id column '{name}' is {kind}: it must hold integers, strings or bytes")
    for setting, column in settings.row_settings.columns.items():
        if column == name and (needed := misfit(setting, kind)):
            raise InputError(f"{file}: {setting} column '{name}' is {kind}: it must be {needed}")
    return plain_type(kind)
