"""Converts the records of a whole job (plan.json, manifest.json) to and from Python values, and holds its status."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from pipeline.config.job import Job, rename_old_keys
from pipeline.core.types import Totals
from pipeline.output.packing_lines import from_lines, to_lines
from pipeline.output.records import Count, Record, now
from pipeline.planning.fingerprint import WORK_UNITS, Fingerprint, Listing, digest_of
from pipeline.planning.packing import Packing
from pipeline.planning.plan import Plan
from pipeline.storage.urls import safe_url


class ManifestRecord(Record):
    """The two fields of manifest.json that a resume, `status` and the report read."""

    finished: str | None = None
    """The time when the job completed, ISO 8601 in UTC; None if there is no readable manifest."""
    warnings: tuple[str, ...] = ()
    """The warnings of the run that completed the job."""


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

    Reading it fails if the digest is not that of the fingerprint's fields, or `rows` is not the sum over the files.
    """

    fingerprint: Fingerprint
    rows: Count
    """The number of input rows."""
    units: Count
    """The number of work units."""
    files: Annotated[tuple[PlannedFile, ...], Field(fail_fast=True)]
    packing: Annotated[tuple[str, ...], Field(fail_fast=True)] = ()
    """A line for each unit (pipeline.output.packing_lines); none with version 1 of the unit rules."""
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
    places = {file.name: (number, file.rows) for number, file in enumerate(plan.files)}
    return {
        "fingerprint": {"digest": plan.fingerprint.digest, "fields": plan.fingerprint.fields},
        "rows": plan.rows,
        "units": len(plan.units),
        "files": [
            {"name": file.name, "size": file.size, "stamp": file.stamp, "rows": file.rows} for file in plan.files
        ],
        **({"packing": to_lines(plan.units, places)} if plan.units[0].rules > 1 else {}),
        "created": now(),
        **({} if plan.prompts.chat is None else {"prompt_date": plan.prompts.chat.date}),
        "job": _job_settings(job),
    }
