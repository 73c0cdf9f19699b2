"""Checks that every input file has the columns that the job reads, and derives the schema of the parts from them."""

import pyarrow as pa

from pipeline.config.job import InputSection
from pipeline.core.errors import InputError
from pipeline.core.schema import RESULT_COLUMNS, is_id, is_text, merge_types, output_schema, plain_type
from pipeline.input.row_settings import misfit
from pipeline.planning.footers import Footer
from pipeline.prompts.template import template_columns
from pipeline.storage.storage import FileInfo


def check_columns(settings: InputSection, footers: list[tuple[FileInfo, Footer]]) -> pa.Schema:
    """Return the schema of the parts, from the schemas of all input files.

    Raises InputError if a column that the job reads is missing, is in a file twice, has a wrong type or has different
    types in two files, if the prompt or id column is null in every file, or if a carried column is named twice or like
    a column of the output.
    """
    _check_names(settings)
    prompt = settings.prompt_column
    prompts = template_columns(settings.template) if settings.template is not None else ()
    ids = [settings.id_column] if settings.id_column else []
    kept = dict.fromkeys([*ids, *settings.carry, *settings.row_settings.columns.values()])
    types: dict[str, tuple[pa.DataType, str]] = {}
    for info, footer in footers:
        for name in [*([prompt] if prompt is not None else prompts), *kept]:
            kind = _column_type(info.name, footer.schema, name, settings)
            if name in prompts and name not in kept:  # a template can use any type
                continue
            first, first_file = types.setdefault(name, (kind, info.name))
            merged = merge_types(first, kind)  # a column that is all null in one file fits any type
            if merged is None:
                raise InputError(
                    f"column '{name}' is {first} in {first_file} but {kind} in {info.name}: make them one type"
                )
            types[name] = (merged, first_file if merged == first else info.name)
    for role, used in (("prompt", prompt), ("id", settings.id_column)):
        if used and pa.types.is_null(types[used][0]):
            raise InputError(
                f"{role} column '{used}' is null in every file: it must have values, of a string type"
                + (" or integers" if role == "id" else "")
            )
    id_type = types[settings.id_column][0] if settings.id_column else pa.string()
    return output_schema(id_type, [pa.field(name, types[name][0]) for name in settings.carry])


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
        if settings.template and name in template_columns(settings.template):
            text = f"the template reads column '{name}', which is not there"
        else:
            roles = {column: f"row_settings.{setting}" for setting, column in settings.row_settings.columns.items()}
            roles |= dict.fromkeys(settings.carry, "carry")
            roles |= {settings.prompt_column or "": "prompt_column", settings.id_column or "": "id_column"}
            text = f"no column '{name}' (input.{roles[name]})"
        raise InputError(f"{file}: {text}; its columns: {', '.join(schema.names) or 'none'}")
    kind = schema.field(name).type
    if pa.types.is_null(kind):
        return kind
    if name == settings.prompt_column and not is_text(kind):
        raise InputError(f"{file}: prompt column '{name}' is {kind}: it must be a string column")
    if name == settings.id_column and not is_id(kind):
        raise InputError(f"{file}: id column '{name}' is {kind}: it must be an integer or string column")
    for setting, column in settings.row_settings.columns.items():
        if column == name and (needed := misfit(setting, kind)):
            raise InputError(f"{file}: {setting} column '{name}' is {kind}: it must be {needed}")
    return plain_type(kind)
