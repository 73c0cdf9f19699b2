"""Converts the records of the output folder (parts, commit records, plan, manifest) to and from Python values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.job import Job, rename_old_keys
from pipeline.core.schema import SCHEMA_VERSION
from pipeline.core.text import one_line
from pipeline.core.types import Totals, UnitResult
from pipeline.output.part import TOTALS_KEY
from pipeline.planning.fingerprint import Fingerprint, digest_of
from pipeline.planning.plan import Plan
from pipeline.storage.urls import safe_url

T = TypeVar("T")
RECORD_KEY = "twotower.unit"
ADDED_LATER: Mapping[str, int | str] = {"degenerate": 0, "published": ""}
"""Fields that records of earlier versions do not have, with the value to use instead."""


class NotOursError(ValueError):
    """A file whose content is not what this project writes under that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """A part's record about itself, kept in its key-value metadata."""

    unit: str
    file: str
    first_row: int
    rows: int
    fingerprint: str
    writer: str
    """Unique id of the attempt that wrote the part. It shows whether a part that already exists was written by this
    attempt, whose success was not acknowledged, or by another one."""
    replica: str
    attempt: int
    seconds: float
    size: int
    """Size of the input file in bytes; with `stamp`, it tells which version of the file the rows were read from."""
    stamp: str
    schema_version: int = SCHEMA_VERSION
    published: str = ""
    """Time just before the publication, ISO 8601 in UTC by the replica's clock; "" in parts of earlier versions."""


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """The content of plan.json."""

    fingerprint: Fingerprint
    rows: int
    units: int
    files: dict[str, tuple[int, str, int]]
    """(size in bytes, stamp, rows) of each input file, by name."""
    created: str
    job: dict[str, Any]
    """Settings of the job without credentials, under today's names of the keys."""


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


def totals_from(fields: Mapping[str, Any]) -> Totals:
    """Return the totals in a record that holds their fields. Raises NotOursError if they are missing or do not add
    up."""
    reasons = fields.get("finish_reasons")
    if not isinstance(reasons, dict):
        raise NotOursError(f"finish_reasons is {reasons!r}")
    known = {**ADDED_LATER, **fields}
    counts = {name: _count(known, name) for name in Totals.__dataclass_fields__ if name != "finish_reasons"}
    totals = Totals(**counts, finish_reasons={name: _count(reasons, name) for name in reasons})
    if not totals.ok + totals.errors == sum(totals.finish_reasons.values()) == totals.rows:
        raise NotOursError(f"{totals.rows} rows are not {totals.ok} ok and {totals.errors} errors")
    return totals


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = _typed(fields, name, int)
    if not 0 <= value < 2**63:
        raise NotOursError(f"{name} is {value}")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else _typed(fields, name, float)


def _typed(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise NotOursError(f"{name} is {value!r}" if name in fields else f"it has no {name}")
    return value


def read_part(source: pa.NativeFile) -> tuple[PartRecord, Totals]:
    """Return a part's record and totals from its footer. Raises NotOursError if it is not a whole part of this
    project."""
    try:
        metadata = pq.read_metadata(source)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column name that is not UTF-8
        raise NotOursError(one_line(error)) from error
    pairs = metadata.metadata or {}
    try:
        record = _part_record(from_json(pairs[RECORD_KEY.encode()]))
        totals = totals_from(from_json(pairs[TOTALS_KEY.encode()]))
    except (KeyError, NotOursError) as error:
        raise NotOursError("its footer has no unit record of this project") from error
    if not record.rows == totals.rows == metadata.num_rows:
        raise NotOursError(f"it holds {metadata.num_rows} rows, its record says {record.rows}")
    return record, totals


def _part_record(fields: Mapping[str, Any]) -> PartRecord:
    return PartRecord(
        unit=_typed(fields, "unit", str),
        file=_typed(fields, "file", str),
        first_row=_count(fields, "first_row"),
        rows=_count(fields, "rows"),
        fingerprint=_typed(fields, "fingerprint", str),
        writer=_typed(fields, "writer", str),
        replica=_typed(fields, "replica", str),
        attempt=_count(fields, "attempt"),
        seconds=_number(fields, "seconds"),
        size=_typed(fields, "size", int),
        stamp=_typed(fields, "stamp", str),
        schema_version=_count(fields, "schema_version"),
        published=_typed({**ADDED_LATER, **fields}, "published", str),
    )


def commit_record(record: PartRecord, result: UnitResult, part_bytes: int) -> dict[str, Any]:
    """Return the commit record of a published part: its own record and totals, its checksum and its size in bytes."""
    fields = {**asdict(record), **asdict(result.totals)}
    return {**fields, "seconds": result.seconds, "sha256": result.sha256, "part_bytes": part_bytes}


def read_commit(data: bytes) -> tuple[UnitResult, int]:
    """Return the unit's result and the size of its part in bytes, read from its commit record. Raises NotOursError if
    the bytes are not a commit record."""
    fields = from_json(data)
    result = UnitResult(
        unit_id=_typed(fields, "unit", str),
        totals=totals_from(fields),
        seconds=_number(fields, "seconds"),
        sha256=_typed(fields, "sha256", str),
        replica=_typed(fields, "replica", str),
        attempt=_count(fields, "attempt"),
    )
    return result, _count(fields, "part_bytes")


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


def read_plan(data: bytes) -> PlanRecord:
    """Return the content of a plan.json as a record. Raises NotOursError if it is not as plan_fields makes it."""
    value = from_json(data)
    fingerprint: dict[str, Any] = _typed(value, "fingerprint", dict)
    fields: dict[str, Any] = _typed(fingerprint, "fields", dict)
    digest = _typed(fingerprint, "digest", str)
    if digest != digest_of(fields):
        raise NotOursError("fingerprint.digest is not that of fingerprint.fields")
    files: dict[str, tuple[int, str, int]] = {}
    for entry in _typed(value, "files", list):
        if not isinstance(entry, dict):
            raise NotOursError(f"files holds {entry!r}")
        sizes = _count(entry, "size"), _typed(entry, "stamp", str), _count(entry, "rows")
        files[_typed(entry, "name", str)] = sizes
    rows, units = _count(value, "rows"), _count(value, "units")
    created = _typed(value, "created", str)
    try:
        job = rename_old_keys(_typed(value, "job", dict))
    except ValueError as error:
        raise NotOursError(f"job: {error}") from None
    if (promised := sum(file_rows for _, _, file_rows in files.values())) != rows:
        raise NotOursError(f"rows is {rows}, its files have {promised}")
    return PlanRecord(Fingerprint(fields, digest), rows, units, files, created, job)


def finished_at(data: bytes) -> str:
    """Return the time when the job of a manifest.json completed. Raises NotOursError if the manifest is not valid."""
    return _typed(from_json(data), "finished", str)


def warnings_in(data: bytes) -> tuple[str, ...]:
    """Return the warnings in a manifest.json (earlier versions have none). Raises NotOursError if it is not valid."""
    return tuple(str(warning) for warning in _typed({"warnings": [], **from_json(data)}, "warnings", list))
