"""Makes the plan of a job: its files, its work units and its fingerprint. It reads listings and footers, never data."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config.job import Job
from pipeline.core.errors import InputError
from pipeline.core.text import counted
from pipeline.core.types import WorkUnit
from pipeline.input.files import list_input, would_read
from pipeline.planning.columns import check_columns
from pipeline.planning.cost import ExpectedWork, prompt_columns
from pipeline.planning.fingerprint import Fingerprint, Listing, make_fingerprint
from pipeline.planning.footers import name_unreadable, read_footers
from pipeline.planning.part_size import measured_columns, rows_per_unit
from pipeline.planning.prompts import Begun, ModelTexts, make_setup
from pipeline.prompts.setup import PromptSetup
from pipeline.storage.storage import FileInfo
from pipeline.storage.urls import safe_url

MAX_UNITS = 1_000_000
"""The most units of a job, because the driver holds them all in memory."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file as it was when the plan was made."""

    name: str
    """The path relative to the input root."""
    url: str
    """The path or URL that opens the file."""
    size: int
    """The size in bytes."""
    stamp: str
    """The FileInfo.stamp, which changes when the content does."""
    rows: int
    """The number of rows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a job: its input files, cut into work units, and the fingerprint that identifies it at a resume."""

    files: tuple[InputFile, ...]
    """The readable input files."""
    units: tuple[WorkUnit, ...]
    """All units of these files, in the order of files and rows."""
    rows: int
    """The number of rows in all files."""
    fingerprint: Fingerprint
    schema: pa.Schema
    """The schema of every part."""
    prompts: PromptSetup
    """How the prompts are made."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(name, reason) of input files that cannot be read; empty unless make_plan was called with allow_unreadable."""

    @property
    def listing(self) -> Listing:
        """Return the files in the form in which they are compared with those in plan.json."""
        return {file.name: (file.size, file.stamp, file.rows) for file in self.files}


def make_plan(
    job: Job,
    *,
    checkpoint_identity: str,
    texts: ModelTexts | None = None,
    begun: Begun | None = None,
    allow_unreadable: bool = False,
) -> Plan:
    """Return the plan of a job: list its input, read all footers in parallel and cut the files into units.

    `checkpoint_identity`: the hash of the checkpoint's content, for the fingerprint. `texts`: those of the checkpoint
    that prompts need (read_model_texts); None if no prompts will be made. `begun`: the facts about prompts that the
    output was begun with (Ledger.begun); None for a new output. With `allow_unreadable`, files that cannot be read are
    left out if others can be read. Raises InputError (one line that names the file or column)
    if there are no rows or too many units, if the output lies in the input, or if a file or column cannot be used;
    raises StorageError if the listing fails.
    """
    root, listing = list_input(job.input.path)
    shown = safe_url(job.input.path)
    if would_read(job.input.path, root, job.output.path):
        raise InputError(
            f"output {safe_url(job.output.path)} lies inside input {shown}: its parts would become input; "
            "give the output a folder of its own"
        )
    footers, unreadable = read_footers(root, listing, measured_columns(job), prompt_columns(job.input))
    if unreadable and (not allow_unreadable or not footers):
        raise InputError(name_unreadable(shown, len(listing), unreadable))
    prompts = make_setup(job.input, footers, texts or ModelTexts(), begun or Begun())
    schema = check_columns(job.input, prompts, footers, keep_prompt=job.output.keep_prompt)
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
        raise InputError(f"input {shown} has no rows: {counted(len(files), 'file')} without a row")
    fingerprint = make_fingerprint(job, schema, checkpoint_identity, prompts)
    return Plan(tuple(files), tuple(units), rows, fingerprint, schema, prompts, tuple(unreadable))


def cut(groups: Sequence[int], rows_per_unit: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of each unit of a file. `groups`: the number of rows in each row group.

    Whole row groups are put together up to `rows_per_unit`. A group with more rows is cut into pieces of about equal
    size.
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
    """Return the id of the unit that begins at this row of a file. It depends on nothing else, so it is the same at a
    resume. `name`: the file's path relative to the input root."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{first_row:010d}"


def _units_of(info: FileInfo, groups: Sequence[int], rows_per_unit: int, work: ExpectedWork) -> Iterator[WorkUnit]:
    for first, count in cut(groups, rows_per_unit):
        whole = info.path, info.name, first, count, info.size, info.stamp
        yield WorkUnit(unit_id(info.name, first), *whole, work.of(first, count))
