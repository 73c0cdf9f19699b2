"""Converts the records of a whole job (plan.json, manifest.json) to and from Python values, and holds its status.

plan.json has a line for each unit. The line names files by their position in the plan's list of files, from 0: `7` for
the whole of a file, `7-9` for three whole files one after the other, and `7:100+50` for 50 rows from row 100 on.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from pipeline.config.job import Job, rename_old_keys
from pipeline.core.types import Totals, WorkUnit
from pipeline.output.layout import PLAN
from pipeline.output.records import Count, NotOursError, Record, now, to_json
from pipeline.planning.fingerprint import WORK_UNITS, Fingerprint, Listing, digest_of
from pipeline.planning.packing import Packing, Span
from pipeline.planning.plan import Plan
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

_CHECKSUM = b',\n "checksum": "'
"""The bytes before the checksum of plan.json, which is of all bytes before these."""
_PIECE = re.compile(r"(?P<file>\d+)(?:-(?P<last>\d+)|:(?P<first>\d+)\+(?P<rows>\d+))?")


class ManifestRecord(Record):
    """The fields of manifest.json that a resume, `status` and the report read."""

    finished: str | None = None
    """The time when the job completed, ISO 8601 in UTC; None if there is no readable manifest."""
    warnings: tuple[str, ...] = ()
    """The warnings of the run that completed the job."""
    rows: int | None = None
    units: int | None = None
    files: int | None = None
    fingerprint: str | None = None

    def agrees(self, fingerprint: str, rows: int, units: int) -> bool:
        """Return whether this is the manifest of a job with this fingerprint digest, these rows and these units.

        A manifest that cannot be read has none of these, and does not disagree.
        """
        return self.finished is None or (self.fingerprint, self.rows, self.units) == (fingerprint, rows, units)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """An input file as plan.json lists it.

    It is checked as a Record is. A data class takes a third of the memory, and there may be very many files.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    name: str
    """The path relative to the input root."""
    size: Count
    """The size in bytes."""
    stamp: str
    """The FileInfo.stamp of the file when the plan was made."""
    rows: Count
    """The number of rows."""


class PlanRecord(Record):
    """The content of plan.json: which job the output folder belongs to, and what the job is to generate.

    Reading it fails if the digest is not that of the fingerprint's fields, or `rows` is not the sum over the files, or
    if the checksum of its bytes is wrong: a name of a file or a day with one wrong bit looks like that of another job.
    """

    fingerprint: Fingerprint
    rows: Count
    """The number of input rows."""
    units: Count
    """The number of work units."""
    files: Annotated[tuple[PlannedFile, ...], Field(fail_fast=True)]
    packing: Annotated[tuple[str, ...], Field(fail_fast=True)] = ()
    """A line for each unit (to_lines); none with version 1 of the unit rules."""
    created: str
    """The time when the job first ran, ISO 8601 in UTC."""
    prompt_date: str | None = None
    """The day that chat templates print, as YYYY-MM-DD; None without a chat template."""
    job: Annotated[dict[str, Any], AfterValidator(rename_old_keys)]
    """The job's settings without credentials. Keys that were renamed after the plan was made have their new names."""

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Return the record in these JSON bytes. Raises NotOursError as Record.read does, or if they are damaged.

        Plans of earlier versions have no checksum, and those that were written by other programs have none here.
        """
        record = super().read(data)
        content, _, end = data.rpartition(_CHECKSUM)
        if content and end.partition(b'"')[0] != _checksum(content):
            raise NotOursError("it is damaged: its checksum is not that of its content")
        return record

    @cached_property
    def listing(self) -> Listing:
        """Return the input files by name, in the form in which they are compared with those of a Plan."""
        return {file.name: (file.size, file.stamp, file.rows) for file in self.files}

    @cached_property
    def units_stored(self) -> Packing:
        """Return the units in `packing`; none with version 1 of the unit rules."""
        return from_lines(self.packing, [(file.name, file.rows) for file in self.files]) if self.unit_rules > 1 else ()

    @property
    def unit_rules(self) -> int:
        """Return the version of the rules by which the units are cut."""
        return int(self.fingerprint.fields.get(WORK_UNITS, 1))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fingerprint.digest != digest_of(self.fingerprint.fields):
            raise ValueError("fingerprint.digest is not that of fingerprint.fields")
        if (promised := sum(rows for _, _, rows in self.listing.values())) != self.rows:
            raise ValueError(f"rows is {self.rows}, its files have {promised}")
        if self.unit_rules > 1 and len(self.units_stored) != self.units:
            raise ValueError(f"units is {self.units}, its packing has {len(self.units_stored)}")
        return self


def plan_digest(storage: Storage) -> str | None:
    """Return the digest of the fingerprint in the plan.json of an output folder; None if there is none that can be
    read. Raises StorageError if the storage fails."""
    with suppress(NotOursError):
        return PlanRecord.read(storage.read_if_exists(PLAN) or b"").fingerprint.digest
    return None


@dataclass(frozen=True, slots=True)
class Status:
    """The progress of a job, read from its output folder alone."""

    rows_done: int
    """The number of rows in parts."""
    rows_total: int
    units_done: int
    """The number of units that have a part."""
    units_total: int
    totals: Totals
    """The sum of the parts' totals. `duplicate_ids` counts only ids that repeat inside one part."""
    complete: bool
    """True if `_SUCCESS` exists, all units have their parts, and the manifest, if there is one, is of this plan."""
    fingerprint: str
    """The digest of the job's fingerprint."""
    created: str
    """The time when the job first ran, ISO 8601 in UTC."""
    finished: str | None
    """The time when the job completed, ISO 8601 in UTC; None if it is not complete or its manifest cannot be read."""
    rows_saved: int = 0
    """The number of rows in segments of units that have no part yet. A resume does not generate them again. A row that
    two attempts saved counts twice."""
    driver: str | None = None
    """The driver that runs the job or ran it last, as text; None if there is no claim or the newest cannot be read."""
    warnings: tuple[str, ...] = ()
    """The warnings in the manifest; empty if the job is not complete."""


def manifest_fields(
    plan: Plan,
    job: Job,
    totals: Totals,
    duplicate_ids: int,
    examples: Sequence[str],
    seconds: float,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Return the content of manifest.json for a complete job.

    `totals`: those of all parts. `duplicate_ids`: the rows that repeat an id anywhere in the output, with `examples` of
    such ids. `seconds`: wall clock of the run that completed the job.
    """
    return {
        "rows": totals.rows,
        "ok": totals.ok,
        "errors": totals.errors,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "denoiser_forwards": totals.denoiser_forwards,
        "finish_reasons": dict(sorted(totals.finish_reasons.items())),
        "duplicate_ids": duplicate_ids,
        "duplicate_id_examples": list(examples),
        "null_ids": totals.null_ids,
        "degenerate": totals.degenerate,
        "warnings": list(warnings),
        "units": len(plan.units),
        "files": len(plan.files),
        "seconds": round(seconds, 3),
        "fingerprint": plan.fingerprint.digest,
        "job": _job_settings(job),
        "finished": now(),
    }


def _job_settings(job: Job) -> dict[str, Any]:
    """Return all settings as JSON values, without the credentials in the URLs of input, output and checkpoint."""
    settings = job.model_dump(mode="json")
    settings["input"]["path"] = safe_url(job.input.path)
    settings["output"]["path"] = safe_url(job.output.path)
    settings["model"]["checkpoint"] = safe_url(job.model.checkpoint)
    return settings


def plan_fields(plan: Plan, job: Job, created: str = "") -> dict[str, Any]:
    """Return the content of plan.json, as PlanRecord reads it. `created`: when the job first ran; now if it is ""."""
    places = {file.name: (number, file.rows) for number, file in enumerate(plan.files)}
    return {
        "fingerprint": {"digest": plan.fingerprint.digest, "fields": plan.fingerprint.fields},
        "rows": plan.rows,
        "units": len(plan.units),
        "files": [
            {"name": file.name, "size": file.size, "stamp": file.stamp, "rows": file.rows} for file in plan.files
        ],
        **({"packing": to_lines(plan.units, places)} if plan.units[0].rules > 1 else {}),
        "created": created or now(),
        **({} if plan.prompts.chat is None else {"prompt_date": plan.prompts.chat.date}),
        "job": _job_settings(job),
    }


def plan_json(fields: Mapping[str, Any]) -> bytes:
    """Return plan.json with this content (plan_fields) and a checksum of its bytes, which PlanRecord.read checks."""
    content = to_json(fields).removesuffix(b"\n}\n")
    return content + _CHECKSUM + _checksum(content) + b'"\n}\n'


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def to_lines(units: Sequence[WorkUnit], files: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a line for each unit. `files`: the position and the number of rows of each file, by its name."""
    return [" ".join(_words(unit, files)) for unit in units]


def from_lines(lines: Sequence[str], files: Sequence[tuple[str, int]]) -> Packing:
    """Return the units in these lines. `files`: name and number of rows of each file of the plan.

    Raises ValueError if a line cannot be read, names no rows or names a file twice, or if the units together do not
    hold every row once.
    """
    packing = [tuple(_spans(line, files)) for line in lines]
    ends = dict.fromkeys((name for name, _ in files), 0)
    for span in sorted(chain.from_iterable(packing)):
        if span.first_row != ends[span.file]:
            raise ValueError(f"its units do not hold each row of {span.file} once")
        ends[span.file] += span.rows
    if missing := next((name for name, rows in files if ends[name] != rows), None):
        raise ValueError(f"its units do not hold each row of {missing} once")
    for line, spans in zip(lines, packing, strict=True):
        if not all(span.rows for span in spans) or not 0 < len(spans) == len({span.file for span in spans}):
            raise ValueError(f"its unit {line[:60]!r} has no rows of a file, or names a file twice")
    return packing


def _words(unit: WorkUnit, files: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    first = last = -1  # the whole files that are collected, as a range of positions
    for piece in unit.pieces:
        number, rows = files[piece.name]
        whole = piece.row_count == rows
        if whole and first >= 0 and number == last + 1:
            last = number
            continue
        if first >= 0:
            yield f"{first}-{last}" if last > first else f"{first}"
        first, last = (number, number) if whole else (-1, -1)
        if not whole:
            yield f"{number}:{piece.first_row}+{piece.row_count}"
    if first >= 0:
        yield f"{first}-{last}" if last > first else f"{first}"


def _spans(line: str, files: Sequence[tuple[str, int]]) -> Iterator[Span]:
    words = line.split(" ")
    for word in words:
        match = _PIECE.fullmatch(word)
        last = int(match["last"] or match["file"]) if match else len(files)
        if match is None or last >= len(files):
            raise ValueError(f"its unit {line[:60]!r} cannot be read")
        if match["first"] is not None:
            yield Span(files[last][0], int(match["first"]), int(match["rows"]))
        else:
            yield from (Span(name, 0, rows) for name, rows in files[int(match["file"]) : last + 1])
