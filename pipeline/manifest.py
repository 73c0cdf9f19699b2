"""What the output folder's records say, as values: a part's own record, the plan file, the manifest, the status."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import TOTALS_KEY
from pipeline.job import Job
from pipeline.paths import safe_url
from pipeline.plan import Plan
from pipeline.schema import SCHEMA_VERSION
from pipeline.types import Totals, UnitResult

RECORD_KEY = "twotower.unit"


class NotOursError(ValueError):
    """A file is not what this project writes under that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """What a part says of itself in its key-value metadata."""

    unit: str
    file: str
    first_row: int
    rows: int
    fingerprint: str
    writer: str
    """Unique to the attempt that wrote the part: tells a lost acknowledgement from another's part."""
    replica: str
    attempt: int
    seconds: float
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job is, read from its output folder alone."""

    rows_done: int
    rows_total: int
    units_done: int
    units_total: int
    totals: Totals
    complete: bool
    fingerprint: str
    created: str
    """When the job first ran, ISO 8601 in UTC."""
    finished: str | None
    """When it completed, likewise."""


def now() -> str:
    """This moment, ISO 8601 in UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(value: Any) -> bytes:
    """Readable JSON, as all records are written."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def from_json(data: bytes) -> dict[str, Any]:
    """A record's fields. Raises NotOursError where the bytes are no JSON object (a write that never ended, for one)."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise NotOursError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise NotOursError("not a JSON object")
    return value


def totals_from(fields: Mapping[str, Any]) -> Totals:
    """Totals from their JSON form. Raises NotOursError."""
    try:
        return Totals(**fields)
    except TypeError as error:
        raise NotOursError(f"totals: {error}") from None


def read_part(source: pa.NativeFile) -> tuple[PartRecord, Totals]:
    """A part's record and totals, from its footer. Raises NotOursError where it is no whole part of this project."""
    try:
        metadata = pq.read_metadata(source)
    except (pa.ArrowException, OSError) as error:
        raise NotOursError(" ".join(str(error).split())) from error
    pairs = metadata.metadata or {}
    try:
        record = PartRecord(**json.loads(pairs[RECORD_KEY.encode()]))
        totals = totals_from(json.loads(pairs[TOTALS_KEY.encode()]))
    except (KeyError, ValueError, TypeError) as error:
        raise NotOursError("its footer has no unit record of this project") from error
    if not record.rows == totals.rows == metadata.num_rows:
        raise NotOursError(f"it holds {metadata.num_rows} rows, its record says {record.rows}")
    return record, totals


def commit_record(record: PartRecord, result: UnitResult, part_bytes: int) -> dict[str, Any]:
    """The commit record of a published part: what the part says, its checksum and its size in bytes."""
    fields = {**asdict(record), **asdict(result.totals)}
    return {**fields, "seconds": result.seconds, "sha256": result.sha256, "part_bytes": part_bytes}


def result_from_commit(fields: Mapping[str, Any]) -> UnitResult:
    """The unit's result from its commit record. Raises NotOursError."""
    try:
        totals = Totals(**{name: fields[name] for name in Totals.__dataclass_fields__})
        return UnitResult(
            unit_id=fields["unit"],
            totals=totals,
            seconds=fields["seconds"],
            sha256=fields["sha256"],
            replica=fields["replica"],
            attempt=fields["attempt"],
        )
    except KeyError as error:
        raise NotOursError(f"the record has no {error}") from None


def manifest_fields(
    plan: Plan, job: Job, totals: Totals, duplicate_ids: int, examples: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What manifest.json says of a complete job. `seconds`: wall clock of the run that completed it."""
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
    """What plan.json says: the fingerprint with its fields and files, the size of the job, its settings."""
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


def differing_files(old: Mapping[str, Any], plan: Plan) -> str:
    """Which input files differ between a plan.json (its `files` by name) and a plan; at most three are named."""
    new = {file.name: (file.size, file.stamp, file.rows) for file in plan.files}
    found = []
    for name in sorted({*old, *new}):
        if name not in new:
            found.append(f"{name} is gone")
        elif name not in old:
            found.append(f"{name} is new")
        elif (old[name]["size"], old[name]["stamp"], old[name]["rows"]) != new[name]:
            found.append(f"{name} has changed")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"input files: {', '.join(found[:3])}{more}"
