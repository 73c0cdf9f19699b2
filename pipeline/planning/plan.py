"""Makes the plan of a job: its files, its work units and its fingerprint. It reads listings and footers, never data."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config.job import Job
from pipeline.core.errors import InputError
from pipeline.core.types import WorkUnit
from pipeline.input.files import list_input, would_read
from pipeline.planning.columns import check_columns
from pipeline.planning.cost import ExpectedWork, prompt_columns
from pipeline.planning.fingerprint import Fingerprint, Listing, make_fingerprint
from pipeline.planning.footers import name_unreadable, read_footers
from pipeline.planning.part_size import measured_columns, rows_per_unit
from pipeline.storage.storage import FileInfo
from pipeline.storage.urls import safe_url

MAX_UNITS = 1_000_000
"""Maximum number of units of a job, because the driver holds them all in memory."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file at the time of planning."""

    name: str
    """Path relative to the input root."""
    url: str
    """Path or URL that opens the file."""
    size: int
    """Size in bytes."""
    stamp: str
    """Text that changes when the content of the file changes."""
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a job."""

    files: tuple[InputFile, ...]
    units: tuple[WorkUnit, ...]
    rows: int
    fingerprint: Fingerprint
    schema: pa.Schema
    """Schema of every part."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(name, reason) of files that cannot be read; empty unless make_plan was called with allow_unreadable."""

    @property
    def listing(self) -> Listing:
        """Return the input files in the form of a listing, as they are compared with those in plan.json."""
        return {file.name: (file.size, file.stamp, file.rows) for file in self.files}


def make_plan(job: Job, *, checkpoint_identity: str, allow_unreadable: bool = False) -> Plan:
    """List the input, read all footers in parallel and cut the units.

    With `allow_unreadable`, files that cannot be read are left out if others can be read. Raises InputError (one line,
    naming the file and column) if there is nothing to do or a file or column cannot be used, StorageError if the
    listing fails.
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
    schema = check_columns(job.input, footers)
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
    """Yield (first row, number of rows) of each unit of a file whose row groups have these sizes.

    Whole row groups are put together up to the limit. A group above the limit is cut into pieces of about equal size.
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
    """Return the stable id of the unit that begins at this row of a file, given the file's relative name."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{first_row:010d}"


def _units_of(info: FileInfo, groups: Sequence[int], rows_per_unit: int, work: ExpectedWork) -> Iterator[WorkUnit]:
    for first, count in cut(groups, rows_per_unit):
        whole = info.path, info.name, first, count, info.size, info.stamp
        yield WorkUnit(unit_id(info.name, first), *whole, work.of(first, count))
