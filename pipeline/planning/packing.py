"""Cuts the input files into work units, and keeps the units of an output as they were when its input grows.

A file with more rows than a part may have is cut by itself, at the borders of its row groups where possible. Smaller
files are packed together in the order of the listing. Which files share a unit depends on the files around them, so
the packing is stored in plan.json, and only the files that no stored unit covers are packed anew.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.config.job import Job
from pipeline.core.types import UNIT_RULES, Piece, WorkUnit
from pipeline.planning.cost import ExpectedWork
from pipeline.planning.fingerprint import Listing
from pipeline.planning.footers import Footer
from pipeline.planning.part_size import part_bytes, part_limits, rows_per_unit
from pipeline.storage.storage import FileInfo

MAX_PIECES = 1000
"""The most pieces of a unit: each needs requests to the storage, and each is named in the footer of the part."""

MAX_BYTES = 256 << 20
"""The most bytes that are read for a unit with rows of several files: the files, and their prompts uncompressed. A
replica holds the rows of whole units in memory, and a unit above limits.UNIT_BYTES cannot be read at all."""


class Span(NamedTuple):
    """A range of rows of an input file, which is a piece of a stored unit."""

    file: str
    """The file's path relative to the input root."""
    first_row: int
    rows: int


Packing = Sequence[tuple[Span, ...]]
"""The units of an output, each as the spans of its pieces, in the order of the plan."""


ROWS_UNKNOWN = -1
"""The number of rows of a file in StoredUnits.listing if the plan is lost: parts and segments do not name it."""


@dataclass(frozen=True, slots=True)
class StoredUnits:
    """The units that an output was begun with, from its plan.json, or, if that is lost, from its parts and segments. A
    new output has the defaults."""

    rules: int = UNIT_RULES
    """The version of the rules by which units are cut. With version 1 they need not be stored."""
    packing: Packing = ()
    listing: Listing = field(default_factory=dict)
    """The input files that were packed."""
    fingerprint: str = ""
    """The digest of the job's fingerprint. The units of a job with other settings are not used."""
    incomplete: bool = False
    """True if the plan is lost: these are then only the units that have a part or a segment, and some of a file's rows
    may be in none of them."""


def make_units(job: Job, footers: Sequence[tuple[FileInfo, Footer]], stored: StoredUnits) -> Iterator[WorkUnit]:
    """Yield all units of the readable input files: first those that are stored, then those of the other files.

    If the stored units are incomplete, the others are cut and packed anew. They are those of the lost plan unless files
    were added to the input after that was made.
    """
    if stored.rules == 1:
        yield from (unit for info, footer in footers for unit in _whole_file(job, info, footer, rules=1))
        return
    kept = list(_keep(job, footers, stored)) if stored.packing else []
    if stored.incomplete:
        anew = list(_pack(job, footers))
        if {spans_of(unit) for unit in kept} <= {spans_of(unit) for unit in anew}:
            yield from anew
            return
        yield from kept
        yield from _fill(job, footers, kept)
        return
    covered = {piece.name for unit in kept for piece in unit.pieces}
    yield from kept
    yield from _pack(job, [(info, footer) for info, footer in footers if info.name not in covered])


def spans_of(unit: WorkUnit) -> tuple[Span, ...]:
    """Return the pieces of a unit as they are stored."""
    return tuple(Span(piece.name, piece.first_row, piece.row_count) for piece in unit.pieces)


def unit_id(name: str, first_row: int) -> str:
    """Return the id of the unit that begins at this row of a file. `name`: the file's path relative to the input root.

    No two units of a job begin at the same row, so their ids differ.
    """
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{first_row:010d}"


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


def _whole_file(job: Job, info: FileInfo, footer: Footer, *, rules: int = UNIT_RULES) -> Iterator[WorkUnit]:
    """Yield the units of a file that shares none of them with other files."""
    work = _expected_work(job, footer)
    for first, count in cut(footer.groups, rows_per_unit(job, sum(footer.groups), footer.carried_bytes)):
        yield WorkUnit(unit_id(info.name, first), (_piece(info, first, count),), work.of(first, count), rules)


def _pack(job: Job, footers: Sequence[tuple[FileInfo, Footer]]) -> Iterator[WorkUnit]:
    """Yield the units of new files. A large file does not end the unit of the small files around it."""
    most_rows, most_bytes = part_limits(job)
    pieces: list[Piece] = []
    rows, size, held, work = 0, 0.0, 0, 0.0
    for info, footer in footers:
        count = sum(footer.groups)
        if count > rows_per_unit(job, count, footer.carried_bytes):
            yield from _whole_file(job, info, footer)
            continue
        if not count:
            continue
        more = part_bytes(job, count, footer.carried_bytes)
        read = max(0, info.size) + sum(footer.prompt_bytes)
        full = rows + count > most_rows or size + more > most_bytes or held + read > MAX_BYTES
        if pieces and (full or len(pieces) == MAX_PIECES):
            yield _packed(pieces, work)
            pieces, rows, size, held, work = [], 0, 0.0, 0, 0.0
        pieces.append(_piece(info, 0, count))
        rows, size, held = rows + count, size + more, held + read
        work += _expected_work(job, footer).of(0, count)
    if pieces:
        yield _packed(pieces, work)


def _keep(job: Job, footers: Sequence[tuple[FileInfo, Footer]], stored: StoredUnits) -> Iterator[WorkUnit]:
    """Yield the stored units all of whose files are as they were."""
    same = {
        info.name: (info, footer)
        for info, footer in footers
        if stored.listing.get(info.name)
        in ((info.size, info.stamp, sum(footer.groups)), (info.size, info.stamp, ROWS_UNKNOWN))
    }
    for spans in stored.packing:
        if not all(
            span.file in same and span.first_row + span.rows <= sum(same[span.file][1].groups) for span in spans
        ):
            continue  # if the output holds any row, the Ledger refuses the changed files
        pieces, work = [], 0.0
        for span in spans:
            info, footer = same[span.file]
            pieces.append(_piece(info, span.first_row, span.rows))
            work += _expected_work(job, footer).of(span.first_row, span.rows)
        yield _packed(pieces, work)


def _fill(job: Job, footers: Sequence[tuple[FileInfo, Footer]], kept: Sequence[WorkUnit]) -> Iterator[WorkUnit]:
    """Yield units of all rows that are in none of the units in `kept`."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for unit in kept:
        for piece in unit.pieces:
            taken.setdefault(piece.name, []).append((piece.first_row, piece.row_count))
    for info, footer in footers:
        if ranges := taken.get(info.name):
            work = _expected_work(job, footer)
            most = rows_per_unit(job, sum(footer.groups), footer.carried_bytes)
            for first, count in _gaps(footer.groups, most, ranges):
                yield WorkUnit(unit_id(info.name, first), (_piece(info, first, count),), work.of(first, count))
    yield from _pack(job, [(info, footer) for info, footer in footers if info.name not in taken])


def _gaps(groups: Sequence[int], most: int, taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of units, of at most `most` rows, for the rows of a file that are not taken.

    They are those of `cut` where these fit. `taken`: ranges as (first row, number of rows), which do not overlap.
    """
    usual, place = dict(cut(groups, most)), 0
    for first, count in [*sorted(taken), (sum(groups), 0)]:
        pieces, at = [], place
        while at < first and at in usual:
            pieces.append((at, usual[at]))
            at += usual[at]
        if at != first:
            pieces = [(place + start, rows) for start, rows in cut([first - place], most)]
        yield from pieces
        place = first + count


def _packed(pieces: Sequence[Piece], work: float) -> WorkUnit:
    return WorkUnit(unit_id(pieces[0].name, pieces[0].first_row), tuple(pieces), work)


def _piece(info: FileInfo, first: int, count: int) -> Piece:
    return Piece(info.path, info.name, first, count, info.size, info.stamp)


def _expected_work(job: Job, footer: Footer) -> ExpectedWork:
    return ExpectedWork(footer.groups, footer.prompt_bytes, job.generation.max_new_tokens)
