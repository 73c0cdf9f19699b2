"""Manages the output folder for the driver: which job it belongs to, which units are finished, and the final totals.

Parts are the authoritative record. Commit records are written after them, and rewritten from them if they are missing.
Then come the manifest and, last, `_SUCCESS`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.config.job import Job
from pipeline.core.errors import OutputError, StorageError
from pipeline.core.types import Totals, UnitResult
from pipeline.output.claim import newest_driver
from pipeline.output.duplicate_ids import find_duplicates
from pipeline.output.layout import (
    MANIFEST,
    PARTS,
    PLAN,
    RECORDS,
    SEGMENTS,
    SUCCESS,
    check_writable,
    part_name,
    record_name,
)
from pipeline.output.records import (
    ManifestRecord,
    NotOursError,
    PlanRecord,
    Status,
    manifest_fields,
    plan_fields,
    read_part,
    to_json,
)
from pipeline.output.segments import read_record
from pipeline.output.unit_store import check_part, write_record
from pipeline.planning.fingerprint import differences, listing_change
from pipeline.planning.plan import Plan
from pipeline.storage.storage import FileInfo, Storage
from pipeline.storage.urls import safe_url

READ_THREADS = 16
HALF_WRITTEN = (("", ".part-*.tmp"), (RECORDS, ".*.tmp"))
"""Files that a killed writer of a part or a record leaves on a local disk: (folder, pattern)."""


class Ledger:
    """One output folder. Methods raise OutputError if its content is not valid, StorageError if the storage fails."""

    def __init__(self, output_path: str, fingerprint_digest: str | None = None) -> None:
        """Open the folder for the job with this fingerprint digest; with None, call only methods that take no Plan."""
        self.path = output_path
        self._digest = fingerprint_digest
        self._storage = Storage(output_path)
        self._shown = safe_url(output_path)

    # For the driver, before and after the run.

    def open(self, plan: Plan, job: Job) -> None:
        """Take the folder for this job.

        Raises OutputError if the folder cannot be written to, belongs to another job, holds rows of unknown origin, or
        was planned over other input. The plan of another job that never finished a row is replaced, because nothing is
        lost. With `input.on_change: extend` the plan is replaced by one with more files, and `_SUCCESS` is removed
        before.
        """
        old = self.check(plan, job)
        if old is None:
            check_writable(self.path)
            if self._storage.create(PLAN, to_json(plan_fields(plan, job))):
                return
            old = self.check(plan, job)  # another run of this job, or of another one, was faster
        if old is None or not _same(old, plan):
            check_writable(self.path)
            self.reopen()
            fields = plan_fields(plan, job)
            if old is not None and old.fingerprint == plan.fingerprint:
                fields["created"] = old.created
            self._storage.write(PLAN, to_json(fields))
        elif not self.is_complete():
            check_writable(self.path)

    def check(self, plan: Plan, job: Job) -> PlanRecord | None:
        """Return the folder's plan.json, or None if there is none; write nothing. Raises OutputError if the folder
        cannot be this job's."""
        self._refuse_file()
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            if found := self._finished_rows():
                raise OutputError(
                    f"output {self._shown} holds {len(found)} file(s) of finished rows such as {found[0]} but no "
                    f"{PLAN}: they are of unknown origin; use another output.path or delete it"
                )
            return None
        old = self._parse_plan(data)
        if not _same(old, plan) and self._finished_rows():
            self._refuse_settings(old, plan)
            self._refuse_input(old, plan, extend=job.input.on_change == "extend")
        return old

    def finished(self, plan: Plan, *, repair: bool = True) -> dict[str, UnitResult]:
        """Return the results of the units that have a part, by unit id. With `repair`, missing commit records are
        written again.

        This takes one request per part: its footer is read but not its data, and its commit record is only looked for,
        so the `sha256` of the result is empty unless that record was written again. Raises OutputError with the name of
        the part if one is truncated, replaced or of another job. Damaged data and a commit record that does not fit its
        part are found only by `verify`.
        """
        planned = {part_name(unit.id): unit for unit in plan.units}
        parts = self._parts()
        for part in parts:
            if part.name not in planned:
                raise OutputError(f"output {self._shown}: {part.name} is no part of this job's plan: delete it")
        records = {record.name for record in self._storage.list_files(RECORDS, "*.json") if record.size}

        def read(part: FileInfo) -> UnitResult:
            unit = planned[part.name]
            with self._storage.open(part.name, part.size) as source:
                record, totals = check_part(self._shown, self._digest, unit, source)
            missing = repair and record_name(unit.id) not in records
            digest = self._storage.sha256(part.name, part.size) if missing else ""
            result = UnitResult(unit.id, totals, record.seconds, digest, record.replica, record.attempt)
            if missing:
                write_record(self._storage, record, result, part.size)
            return result

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return {result.unit_id: result for result in pool.map(read, parts)}

    def complete(
        self, plan: Plan, job: Job, totals: Totals, *, seconds: float, warnings: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Write the manifest, then `_SUCCESS`, and return the manifest. `seconds`: wall-clock time of the run.

        Raises OutputError if a unit has no part, if the totals do not cover all rows, or if another run has taken the
        folder: the job is not complete then.
        """
        self._refuse_taken(plan)
        parts = self._parts()
        planned = {part_name(unit.id) for unit in plan.units}
        missing = len(planned - {part.name for part in parts})
        if unknown := [part.name for part in parts if part.name not in planned]:
            raise OutputError(f"output {self._shown}: {unknown[0]} is no part of this job's plan: submit the job again")
        if missing or totals.rows != plan.rows:
            raise OutputError(
                f"output {self._shown} is not complete: {missing} of {len(plan.units)} parts are missing and "
                f"{totals.rows} of {plan.rows} rows are counted: submit the job again"
            )
        # Ids that the pipeline makes itself (file and row) cannot repeat.
        given = job.input.id_column is not None
        duplicates, examples = find_duplicates(self._storage, parts, plan.rows) if given else (0, ())
        manifest = manifest_fields(plan, job, totals, duplicates, examples, seconds, warnings)
        self._refuse_taken(plan)  # checked again, because reading all ids takes long
        self._storage.write(MANIFEST, to_json(manifest))
        self._storage.write(SUCCESS, b"")
        self._sweep()
        return manifest

    def is_complete(self) -> bool:
        """Return whether `_SUCCESS` exists."""
        return self._storage.exists(SUCCESS)

    def reopen(self) -> None:
        """Remove `_SUCCESS`, if it exists, because rows are about to be generated."""
        if self.is_complete():
            self._storage.remove(SUCCESS)

    def read_manifest(self) -> ManifestRecord:
        """Return the manifest, or one without content if it is missing or cannot be read."""
        with contextlib.suppress(NotOursError):
            return ManifestRecord.read(self._storage.read_if_exists(MANIFEST) or b"")
        return ManifestRecord()

    def read_plan(self) -> PlanRecord:
        """Return the folder's plan.json. Raises OutputError if the folder is not a job's output."""
        self._refuse_file()
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            there = "is not a job's output: it has no " + PLAN if self._storage.kind() else "does not exist"
            raise OutputError(f"output {self._shown} {there}")
        return self._parse_plan(data)

    def read_parts(self) -> dict[FileInfo, Totals]:
        """Return the totals of each part of the folder's job, without a Plan. Raises OutputError if the folder is not a
        job's output."""
        return self._read_totals(self.read_plan().fingerprint.digest)

    def read_status(self, parts: Mapping[FileInfo, Totals] | None = None) -> Status:
        """Return the progress of the folder's job, without a Plan. Raises OutputError if the folder is not a job's
        output.

        `parts`: the result of read_parts, if the caller has it already.
        """
        plan = self.read_plan()
        digest = plan.fingerprint.digest
        parts = self._read_totals(digest) if parts is None else parts
        totals = sum(parts.values(), Totals())
        complete = (totals.rows, len(parts)) == (plan.rows, plan.units) and self.is_complete()
        manifest = self.read_manifest() if complete else ManifestRecord()
        return Status(
            totals.rows,
            plan.rows,
            len(parts),
            plan.units,
            totals,
            complete,
            digest,
            plan.created,
            manifest.finished,
            rows_saved=self.count_saved(digest),
            driver=newest_driver(self._storage),
            warnings=manifest.warnings,
        )

    # Helpers.

    def _parts(self) -> list[FileInfo]:
        return self._storage.list_files("", PARTS)

    def _segments(self) -> list[FileInfo]:
        return Storage(f"{self.path.rstrip('/')}/{SEGMENTS}").find()

    def _finished_rows(self) -> list[str]:
        """Return the names of the files that hold finished rows: the parts, or the segments if there is no part."""
        return [part.name for part in self._parts()] or [f"{SEGMENTS}/{segment.name}" for segment in self._segments()]

    def count_saved(self, digest: str) -> int:
        """Return the number of rows in segments of units without a part, for the job with this fingerprint."""
        # listed before the parts, so that a unit that is published meanwhile is not counted
        if not (segments := self._segments()):
            return 0
        published = {part.name for part in self._parts()}
        open_units = [each for each in segments if part_name(each.name.partition("/")[0]) not in published]

        def read(segment: FileInfo) -> int:
            # a segment that is gone by now or belongs to another job holds no saved rows
            with (
                contextlib.suppress(NotOursError, StorageError),
                self._storage.open(f"{SEGMENTS}/{segment.name}", segment.size) as source,
            ):
                record, rows = read_record(source)
                return rows if record.fingerprint == digest else 0
            return 0

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return sum(pool.map(read, open_units))

    def _sweep(self) -> None:
        """Remove the segments and what killed writers left half written, once all rows are in parts. A file that cannot
        be removed is left to `clean`."""

        def remove(name: str) -> None:
            with contextlib.suppress(StorageError):
                self._storage.remove(name)

        with contextlib.suppress(StorageError), ThreadPoolExecutor(READ_THREADS) as pool:
            names = [f"{SEGMENTS}/{segment.name}" for segment in self._segments()]
            for folder, pattern in HALF_WRITTEN:
                names += [file.name for file in self._storage.list_files(folder, pattern)]
            list(pool.map(remove, names))

    def _refuse_file(self) -> None:
        if self._storage.kind() == "file":
            raise OutputError(f"output {self._shown} is a file: give a folder")

    def _parse_plan(self, data: bytes) -> PlanRecord:
        try:
            return PlanRecord.read(data)
        except NotOursError as error:
            raise OutputError(
                f"output {self._shown}: {PLAN} cannot be read: {error}; use another output.path or delete it"
            ) from None

    def _refuse_taken(self, plan: Plan) -> None:
        """Raise OutputError if another run, with other settings or input, has taken the folder meanwhile."""
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            return
        self._refuse_settings(there := self._parse_plan(data), plan)
        if (change := listing_change(there.listing, plan.listing)).any:
            raise OutputError(
                f"output {self._shown} is another run's by now, whose input files differ: {change}; "
                "submit the job again"
            )

    def _refuse_settings(self, old: PlanRecord, plan: Plan) -> None:
        """Raise OutputError if the folder's plan has other settings."""
        if found := differences(old.fingerprint.fields, plan.fingerprint.fields):
            listing = listing_change(old.listing, plan.listing)
            said = "; ".join([*([f"input files: {listing}"] if listing.any else []), *found])
            raise OutputError(
                f"output {self._shown} belongs to another job; what differs (there -> here): {said}. "
                "Use another output.path or delete it"
            )

    def _refuse_input(self, old: PlanRecord, plan: Plan, *, extend: bool) -> None:
        """Raise OutputError if the folder's plan has other input files; with `extend`, new files are allowed."""
        change = listing_change(old.listing, plan.listing)
        if change.any and not (extend and change.only_added):
            remedy = "set input.on_change: extend to take them" if change.only_added else "put the input back"
            raise OutputError(
                f"output {self._shown} was planned over other input files: {change}; {remedy}, "
                "or use another output.path"
            )

    def _read_totals(self, digest: str) -> dict[FileInfo, Totals]:
        """Return the totals of each part of the job with this fingerprint. A part that cannot be read or is another
        job's is left out.

        The units are not known without a Plan, but a part that has this fingerprint and its own unit's name is one of
        them.
        """

        def read(part: FileInfo) -> Totals | None:
            with contextlib.suppress(NotOursError), self._storage.open(part.name, part.size) as source:
                record, totals = read_part(source)
                if (part_name(record.unit), record.fingerprint) == (part.name, digest):
                    return totals
            return None

        parts = self._parts()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = zip(parts, pool.map(read, parts), strict=True)
            return {part: totals for part, totals in found if totals is not None}


def _same(old: PlanRecord, plan: Plan) -> bool:
    return old.fingerprint.digest == plan.fingerprint.digest and old.listing == plan.listing


def read_status(output_path: str) -> Status:
    """Return the progress of the job in an output folder. Raises OutputError if the folder is not a job's output."""
    return Ledger(output_path).read_status()
