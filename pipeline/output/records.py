"""Converts the records of the output folder (parts, commit records, plan, manifest) to and from Python values."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.job import Job, rename_old_keys
from pipeline.config.messages import shown
from pipeline.core.schema import SCHEMA_VERSION
from pipeline.core.text import counted, one_line, printable
from pipeline.core.types import Totals, UnitResult, WorkUnit
from pipeline.output.part import TOTALS_KEY
from pipeline.planning.fingerprint import Fingerprint, Listing, digest_of
from pipeline.planning.plan import Plan
from pipeline.storage.urls import safe_url

RECORD_KEY = "twotower.unit"
"""The key of a part's PartRecord in the key-value metadata of the Parquet file."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A count as a field of a record: not negative, and small enough for 64 bits."""


class NotOursError(ValueError):
    """The content of a file is not what this project, or this job, writes under its name.

    The message says what is wrong, without the name of the file.
    """


class Record(BaseModel):
    """The base of the models that check a JSON record when it is read from an output folder.

    Types are not converted: "1" and true are not numbers. Unknown keys are ignored. Records of earlier versions may
    lack fields that have a default.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Return the record in these JSON bytes. Raises NotOursError, which names the first wrong key, if they hold no
        such record."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise NotOursError(_first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a record, in one line that names the key."""
    fault = error.errors(include_url=False)[0]
    key = printable(".".join(map(str, fault["loc"])))
    if fault["type"] == "missing":
        return f"it has no {key}"
    if fault["type"] == "json_invalid":
        return f"not JSON: {fault['ctx']['error']}"
    if fault["type"] == "value_error":  # raised by a validator of this project
        return f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    return f"{key} is {shown(fault['input'])}" if key else "not a JSON object"


class PartRecord(Record):
    """The record in a part's key-value metadata: which rows of which job it holds, and which attempt made it."""

    unit: str
    """The unit's id."""
    file: str
    """The name of the input file (WorkUnit.name)."""
    first_row: Count
    rows: Count
    fingerprint: str
    """The digest of the job's fingerprint."""
    writer: str
    """A unique id of the attempt that made the part. An attempt that finds a part in its place sees from the id whether
    it wrote that part itself, in a call whose answer was lost, or another attempt did."""
    replica: str
    attempt: Count
    seconds: float
    """The seconds from when the replica had read the unit until it began to build the part."""
    size: int
    """The size of the input file in bytes. With `stamp`, it tells which version of the file the rows were read from."""
    stamp: str
    schema_version: Count
    published: str = ""
    """The time just before the publication, ISO 8601 in UTC by the replica's clock; "" in parts of earlier versions."""
    prompt_date: str | None = None
    """The day that chat templates printed, as YYYY-MM-DD; None without a chat template."""


class TotalsRecord(Record):
    """The totals of a part, kept in its key-value metadata beside its PartRecord. The fields are those of Totals."""

    rows: Count
    ok: Count
    errors: Count
    prompt_tokens: Count
    completion_tokens: Count
    denoiser_forwards: Count
    duplicate_ids: Count
    null_ids: Count
    degenerate: Count = 0
    finish_reasons: dict[str, Count]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.ok + self.errors == sum(self.finish_reasons.values()) == self.rows:
            raise ValueError(
                f"rows is {self.rows}, but ok is {self.ok}, errors is {self.errors}, and finish_reasons has "
                f"{sum(self.finish_reasons.values())}"
            )
        return self


class CommitRecord(TotalsRecord, PartRecord):
    """A unit's commit record: its part's PartRecord and totals, and the checksum and size of the part's bytes.

    `seconds` includes the publication if the attempt that made the part also wrote this record; otherwise it is the
    part's own value.
    """

    model_config = ConfigDict(extra="allow")  # so that `verify` can name keys that the part does not have

    sha256: str
    """The SHA-256 (hex) of the part's bytes."""
    part_bytes: Count


class ManifestRecord(Record):
    """The two fields of manifest.json that a resume, `status` and the report read."""

    finished: str | None = None
    """The time when the job completed, ISO 8601 in UTC; None if there is no readable manifest."""
    warnings: tuple[str, ...] = ()
    """The warnings of the run that completed the job."""


class PlannedFile(Record):
    """An input file as plan.json lists it."""

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

    Reading it fails if the digest is not that of the fingerprint's fields, or `rows` is not the sum over the files.
    """

    fingerprint: Fingerprint
    rows: Count
    """The number of input rows."""
    units: Count
    """The number of work units."""
    files: Annotated[tuple[PlannedFile, ...], Field(fail_fast=True)]
    created: str
    """The time when the job first ran, ISO 8601 in UTC."""
    prompt_date: str | None = None
    """The day that chat templates print, as YYYY-MM-DD; None without a chat template."""
    job: Annotated[dict[str, Any], AfterValidator(rename_old_keys)]
    """The job's settings without credentials. Keys that were renamed after the plan was made have their new names."""

    @cached_property
    def listing(self) -> Listing:
        """Return the input files by name, in the form in which they are compared with those of a Plan."""
        return {file.name: (file.size, file.stamp, file.rows) for file in self.files}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fingerprint.digest != digest_of(self.fingerprint.fields):
            raise ValueError("fingerprint.digest is not that of fingerprint.fields")
        if (promised := sum(rows for _, _, rows in self.listing.values())) != self.rows:
            raise ValueError(f"rows is {self.rows}, its files have {promised}")
        return self


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
    """True if `_SUCCESS` exists and all units have their parts."""
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


def now(timespec: str = "seconds") -> str:
    """Return the current time as ISO 8601 in UTC; `timespec`: its precision, as datetime.isoformat takes it."""
    return datetime.now(UTC).isoformat(timespec=timespec)


def to_json(value: Any) -> bytes:
    """Return the value as indented JSON in UTF-8, the format of all records that are files of their own."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def from_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object in these bytes as a dict whose fields are not checked.

    Raises NotOursError if they are not a JSON object, for example after an interrupted write.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotOursError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise NotOursError("not a JSON object")
    return value


def unit_fields(unit: WorkUnit) -> dict[str, Any]:
    """Return the fields in the record of a part or a segment that say which rows of which input file it holds."""
    return {
        "unit": unit.id,
        "file": unit.name,
        "first_row": unit.first_row,
        "rows": unit.row_count,
        "size": unit.size,
        "stamp": unit.stamp,
        "schema_version": SCHEMA_VERSION,
    }


def read_part(source: pa.NativeFile) -> tuple[PartRecord, Totals]:
    """Return a part's record and totals from its footer; the data of its rows is not read.

    Raises NotOursError if the footer cannot be read or has no such record or totals, or if they do not give the number
    of rows in the file.
    """
    try:
        metadata = pq.read_metadata(source)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column name that is not UTF-8
        raise NotOursError(one_line(error)) from error
    pairs = metadata.metadata or {}
    try:
        record = PartRecord.read(pairs[RECORD_KEY.encode()])
        totals = TotalsRecord.read(pairs[TOTALS_KEY.encode()])
    except (KeyError, NotOursError) as error:
        raise NotOursError("its footer has no unit record of this project") from error
    if not record.rows == totals.rows == metadata.num_rows:
        raise NotOursError(f"it holds {counted(metadata.num_rows, 'row')}, its record says {record.rows}")
    return record, Totals(**totals.model_dump())


def commit_record(record: PartRecord, result: UnitResult, part_bytes: int) -> dict[str, Any]:
    """Return the content of the commit record of a published part, as CommitRecord reads it."""
    fields = {**record.model_dump(exclude_none=True), **asdict(result.totals)}
    return {**fields, "seconds": result.seconds, "sha256": result.sha256, "part_bytes": part_bytes}


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


def plan_fields(plan: Plan, job: Job) -> dict[str, Any]:
    """Return the content of plan.json, as PlanRecord reads it. `created` is the current time."""
    return {
        "fingerprint": {"digest": plan.fingerprint.digest, "fields": plan.fingerprint.fields},
        "rows": plan.rows,
        "units": len(plan.units),
        "files": [
            {"name": file.name, "size": file.size, "stamp": file.stamp, "rows": file.rows} for file in plan.files
        ],
        "created": now(),
        **({} if plan.prompts.chat is None else {"prompt_date": plan.prompts.chat.date}),
        "job": _job_settings(job),
    }
