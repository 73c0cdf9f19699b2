"""The plan of a job: its files, its work units and its fingerprint. Reads listings and footers, never data."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bounds import check_footer
from pipeline.errors import InputError, StorageError
from pipeline.expected_work import ExpectedWork, prompt_bytes, prompt_columns
from pipeline.fingerprint import Fingerprint, Listing, make_fingerprint
from pipeline.job import InputSection, Job
from pipeline.listing import list_input, would_read
from pipeline.part_size import carried_bytes, measured_columns, rows_per_unit
from pipeline.paths import safe_url
from pipeline.row_settings import misfit
from pipeline.schema import RESULT_COLUMNS, is_id, is_text, merge_types, output_schema, plain_type
from pipeline.storage import FileInfo, Storage
from pipeline.template import template_columns
from pipeline.types import WorkUnit

FOOTER_THREADS = 16
NAMED_AT_MOST = 3
MAX_UNITS = 1_000_000
"""The driver holds them all."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as planned."""

    name: str
    """Relative to the input root."""
    url: str
    """Path or URL that opens it."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the content does."""
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will do."""

    files: tuple[InputFile, ...]
    units: tuple[WorkUnit, ...]
    rows: int
    fingerprint: Fingerprint
    schema: pa.Schema
    """Of every part."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(name, reason) of files that cannot be read; only where make_plan was told to allow them."""

    @property
    def listing(self) -> Listing:
        """The files as plan.json keeps them."""
        return {file.name: (file.size, file.stamp, file.rows) for file in self.files}


@dataclass(frozen=True, slots=True)
class _Footer:
    groups: tuple[int, ...]
    """Rows of each row group."""
    schema: pa.Schema
    carried_bytes: float
    """Of the columns that go to the output, where that is asked for; else 0."""
    prompt_bytes: tuple[int, ...]
    """Of each row group."""


def make_plan(job: Job, *, checkpoint_identity: str, allow_unreadable: bool = False) -> Plan:
    """Lists the input, reads all footers in parallel and cuts the units.

    Raises InputError (one line, naming the file and column) where there is nothing to do or a file or column cannot
    be used; StorageError where the listing fails.
    """
    root, listing = list_input(job.input.path)
    shown = safe_url(job.input.path)
    if would_read(job.input.path, root, job.output.path):
        raise InputError(
            f"output {safe_url(job.output.path)} lies inside input {shown}: its parts would become input; "
            "give the output a folder of its own"
        )
    footers, unreadable = _read_footers(root, listing, measured_columns(job), prompt_columns(job.input))
    if unreadable and (not allow_unreadable or not footers):
        raise InputError(_name_unreadable(shown, len(listing), unreadable))
    schema = _check_columns(job.input, footers)
    files: list[InputFile] = []
    units: list[WorkUnit] = []
    for info, footer in footers:
        files.append(InputFile(info.name, info.path, info.size, info.stamp, sum(footer.groups)))
        work = ExpectedWork(footer.groups, footer.prompt_bytes, job.generation.max_new_tokens)
        for unit in _units_of(info, footer.groups, rows_per_unit(job, sum(footer.groups), footer.carried_bytes), work):
            units.append(unit)
            if len(units) > MAX_UNITS:
                setting = "rows_per_file" if job.output.target_mb is None else "target_mb"
                raise InputError(f"input {shown} makes more than {MAX_UNITS} units: raise output.{setting}")
    rows = sum(file.rows for file in files)
    if rows == 0:
        raise InputError(f"input {shown} has no rows: {len(files)} file(s), all empty")
    fingerprint = make_fingerprint(job, schema, checkpoint_identity)
    return Plan(tuple(files), tuple(units), rows, fingerprint, schema, tuple(unreadable))


def cut(groups: Sequence[int], rows_per_unit: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the units of a file whose row groups have these sizes.

    Whole groups are put together up to the limit; a group above it is cut inside, into pieces of about one size.
    """
    first = count = 0
    for rows in groups:
        if count and count + rows > rows_per_unit:
            yield first, count
            first, count = first + count, 0
        if rows <= rows_per_unit:
            count += rows
            continue
        pieces = -(-rows // rows_per_unit)
        for piece in range(pieces):
            size = rows * (piece + 1) // pieces - rows * piece // pieces
            yield first, size
            first += size
    if count:
        yield first, count


def unit_id(name: str, first_row: int) -> str:
    """The stable id of the unit of a file (relative name) that begins at a row."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{first_row:010d}"


def _units_of(info: FileInfo, groups: Sequence[int], rows_per_unit: int, work: ExpectedWork) -> Iterator[WorkUnit]:
    for first, count in cut(groups, rows_per_unit):
        whole = info.path, info.name, first, count, info.size, info.stamp
        yield WorkUnit(unit_id(info.name, first), *whole, work.of(first, count))


def _read_footers(
    root: str, listing: list[FileInfo], measured: Sequence[str], prompts: Sequence[str]
) -> tuple[list[tuple[FileInfo, _Footer]], list[tuple[str, str]]]:
    storage = Storage(root)

    def read(info: FileInfo) -> _Footer | str:
        try:
            with storage.open(info.name, info.size) as source:
                parquet = pq.ParquetFile(source)
                parquet.schema_arrow.to_string(show_field_metadata=False, show_schema_metadata=False)  # can be shown
                groups = check_footer(parquet.metadata, info.size)
                carried = carried_bytes(parquet.metadata, measured, info.size)
                return _Footer(groups, parquet.schema_arrow, carried, prompt_bytes(parquet.metadata, prompts))
        except StorageError as error:
            return str(error)
        except UnicodeDecodeError:
            return "has a column name that is not UTF-8: rename the column"
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            return "is empty (0 bytes)" if info.size == 0 else f"is not Parquet: {' '.join(str(error).split())}"

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        results = list(zip(listing, pool.map(read, listing), strict=True))
    good = [(info, footer) for info, footer in results if isinstance(footer, _Footer)]
    bad = [(info.name, reason) for info, reason in results if isinstance(reason, str)]
    return good, bad


def _name_unreadable(shown: str, total: int, unreadable: list[tuple[str, str]]) -> str:
    named = "; ".join(f"{name}: {reason}" for name, reason in unreadable[:NAMED_AT_MOST])
    more = len(unreadable) - NAMED_AT_MOST
    rest = f"; and {more} more" if more > 0 else ""
    return f"input {shown}: {len(unreadable)} of {total} file(s) cannot be read: {named}{rest}"


def _check_columns(settings: InputSection, footers: list[tuple[FileInfo, _Footer]]) -> pa.Schema:
    """The output schema. Raises InputError where a column is missing, of a wrong type, or differs between files."""
    _check_names(settings)
    prompt = settings.prompt_column
    prompts = template_columns(settings.template) if settings.template is not None else ()
    ids = [settings.id_column] if settings.id_column else []
    kept = dict.fromkeys([*ids, *settings.carry, *settings.row_settings.columns.values()])
    types: dict[str, tuple[pa.DataType, str]] = {}
    for info, footer in footers:
        for name in [*([prompt] if prompt is not None else prompts), *kept]:
            kind = _column_type(info.name, footer.schema, name, settings)
            if name in prompts and name not in kept:  # a template takes any type
                continue
            first, first_file = types.setdefault(name, (kind, info.name))
            merged = merge_types(first, kind)  # all null in one file: any type will do
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
        if name.casefold() in taken:  # readers such as DuckDB do not tell ID from id
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
            raise InputError(f"{file}: column '{name}' stands {len(where)} times in the file")
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
