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
from pipeline.core.text import one_line, printable
from pipeline.core.types import Totals, UnitResult, WorkUnit
from pipeline.output.part import TOTALS_KEY
from pipeline.planning.fingerprint import Fingerprint, Listing, digest_of
from pipeline.planning.plan import Plan
from pipeline.storage.urls import safe_url

RECORD_KEY = "twotower.unit"

Count = Annotated[int, Field(ge=0, lt=2**63)]


class NotOursError(ValueError):
    """A file whose content is not what this project writes under that name."""


class Record(BaseModel):
    """The base of all records: frozen, and read without conversion of types ("1" and true are not numbers).

    A field with a default is missing in records of earlier versions. Unknown keys are ignored.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Return the record in these JSON bytes. Raises NotOursError if they hold no such record."""
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
    """A part's record about itself, kept in its key-value metadata."""

    unit: str
    file: str
    first_row: Count
    rows: Count
    fingerprint: str
    writer: str
    """Unique id of the attempt that wrote the part. It shows whether a part that already exists was written by this
    attempt, whose success was not acknowledged, or by another one."""
    replica: str
    attempt: Count
    seconds: float
    size: int
    """Size of the input file in bytes; with `stamp`, it tells which version of the file the rows were read from."""
    stamp: str
    schema_version: Count
    published: str = ""
    """Time just before the publication, ISO 8601 in UTC by the replica's clock; "" in parts of earlier versions."""


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
            raise ValueError(f"{self.rows} rows are not {self.ok} ok and {self.errors} errors")
        return self


class CommitRecord(TotalsRecord, PartRecord):
    """A unit's commit record: its part's own record and totals, and the part's checksum and size in bytes. `seconds`
    is measured again, after the part is published."""

    model_config = ConfigDict(extra="allow")  # so that `verify` names keys that the part does not have

    sha256: str
    part_bytes: Count


class ManifestRecord(Record):
    """The fields of manifest.json that are read back."""

    finished: str | None = None
    """Time when the job completed, ISO 8601 in UTC; None if the manifest does not say."""
    warnings: tuple[str, ...] = ()


class PlannedFile(Record):
    """An input file in plan.json, with its size in bytes."""

    name: str
    size: Count
    stamp: str
    rows: Count


class PlanRecord(Record):
    """The content of plan.json."""

    fingerprint: Fingerprint
    rows: Count
    units: Count
    files: Annotated[tuple[PlannedFile, ...], Field(fail_fast=True)]
    created: str
    job: Annotated[dict[str, Any], AfterValidator(rename_old_keys)]
    """Settings of the job without credentials, under today's names of the keys."""

    @cached_property
    def listing(self) -> Listing:
        """Return the input files in the form of a listing, as they are compared with those of a Plan."""
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
    rows_total: int
    units_done: int
    units_total: int
    totals: Totals
    complete: bool
    """Whether `_SUCCESS` and all rows are there."""
    fingerprint: str
    created: str
    """Time when the job first ran, ISO 8601 in UTC."""
    finished: str | None
    """Time when the job completed, ISO 8601 in UTC; None if it is not complete or its manifest cannot be read."""
    rows_saved: int = 0
    """Number of rows in segments of units that have no part yet; resuming does not generate them again. Rows that two
    attempts saved count twice."""
    driver: str | None = None
    """The driver that runs the job or ran it last, as text; None if no claim can be read."""
    warnings: tuple[str, ...] = ()
    """Warnings in the manifest; empty if the job is not complete."""


def now(timespec: str = "seconds") -> str:
    """Return the current time, ISO 8601 in UTC, in whole seconds or in `milliseconds`."""
    return datetime.now(UTC).isoformat(timespec=timespec)


def to_json(value: Any) -> bytes:
    """Return the value as readable JSON, the format of all records."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def from_json(data: bytes) -> dict[str, Any]:
    """Return the fields of a record. Raises NotOursError if the bytes are not a JSON object, for example after an
    interrupted write."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotOursError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise NotOursError("not a JSON object")
    return value


def unit_fields(unit: WorkUnit) -> dict[str, Any]:
    """Return the fields that say in the record of a part or a segment which rows of which input file it holds."""
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
    """Return a part's record and totals from its footer. Raises NotOursError if it is not a whole part of this
    project."""
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
        raise NotOursError(f"it holds {metadata.num_rows} rows, its record says {record.rows}")
    return record, Totals(**totals.model_dump())


def commit_record(record: PartRecord, result: UnitResult, part_bytes: int) -> dict[str, Any]:
    """Return the content of the commit record of a published part, as CommitRecord reads it."""
    fields = {**record.model_dump(), **asdict(result.totals)}
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
    """Return the content of manifest.json for a complete job. `seconds`: wall clock of the run that completed it."""
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
    settings = job.model_dump(mode="json")
    settings["input"]["path"] = safe_url(job.input.path)
    settings["output"]["path"] = safe_url(job.output.path)
    settings["model"]["checkpoint"] = safe_url(job.model.checkpoint)
    return settings


def plan_fields(plan: Plan, job: Job) -> dict[str, Any]:
    """Return the content of plan.json: the fingerprint with its fields, the input files, the counts and the
    settings."""
    return {
        "fingerprint": {"digest": plan.fingerprint.digest, "fields": plan.fingerprint.fields},
        "rows": plan.rows,
        "units": len(plan.units),
        "files": [
            {"name": file.name, "size": file.size, "stamp": file.stamp, "rows": file.rows} for file in plan.files
        ],
        "created": now(),
        "job": _job_settings(job),
    }
