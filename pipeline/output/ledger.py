"""The driver's side of the output folder: whose it is, what is finished, what it all adds up to.

Parts are the truth; commit records are written after them and made again from them where they are missing; then come
the manifest and, last, `_SUCCESS`.
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
from pipeline.output.publisher import check_part, write_record
from pipeline.output.records import (
    NotOursError,
    PlanRecord,
    Status,
    finished_at,
    manifest_fields,
    plan_fields,
    read_part,
    read_plan,
    to_json,
    warnings_in,
)
from pipeline.output.segments import read_record
from pipeline.planning.fingerprint import differences, listing_change
from pipeline.planning.plan import Plan
from pipeline.storage.storage import FileInfo, Storage
from pipeline.storage.urls import safe_url

READ_THREADS = 16
HALF_WRITTEN = (("", ".part-*.tmp"), (RECORDS, ".*.tmp"))
"""What a killed writer of a part or a record leaves on a local disk: (folder, pattern)."""


class Ledger:
    """One output folder. Methods raise OutputError where it is not as it must be, StorageError where it fails."""

    def __init__(self, output_path: str, fingerprint_digest: str | None = None) -> None:
        """`fingerprint_digest` names the job that may write here; None: only read_status and is_complete are used."""
        self.path = output_path
        self._digest = fingerprint_digest
        self._storage = Storage(output_path)
        self._shown = safe_url(output_path)

    # The driver's side: before, and at the end.

    def open(self, plan: Plan, job: Job) -> None:
        """Takes the folder for this job, or refuses: not writable, another job's, rows of unknown origin, other input.

        The plan of another job that never finished a row is replaced: there is nothing to protect. With
        `input.on_change: extend` the plan is replaced by one with more files, and `_SUCCESS` goes first.
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
        """The folder's plan.json; writes nothing. Raises OutputError where the folder cannot be this job's."""
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
        """The units that have a part, by id. A commit record that is missing is written again, if `repair`.

        One request a part: its footer is read, never its data, and of its commit record only that there is one (the
        `sha256` of such a result is empty). So a part that is truncated, replaced or of another job is found, and
        OutputError names it; damage inside the data, and a record that does not fit its part, are found by `verify`.
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
        """Writes the manifest, then `_SUCCESS`, and returns the manifest. `seconds`: wall clock of the run.

        Raises OutputError where a unit has no part or the totals do not cover all rows: the job is not complete then.
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
        self._refuse_taken(plan)  # reading all ids takes minutes
        self._storage.write(MANIFEST, to_json(manifest))
        self._storage.write(SUCCESS, b"")
        self._sweep()
        return manifest

    def is_complete(self) -> bool:
        """Whether `_SUCCESS` is there."""
        return self._storage.exists(SUCCESS)

    def reopen(self) -> None:
        """Removes `_SUCCESS`, if it is there: rows are about to be generated."""
        if self.is_complete():
            self._storage.remove(SUCCESS)

    def finished_at(self) -> str | None:
        """When the job completed, from its manifest; None where that is missing or cannot be read."""
        with contextlib.suppress(NotOursError):
            return finished_at(self._storage.read_if_exists(MANIFEST) or b"")
        return None

    def warnings(self) -> tuple[str, ...]:
        """What the manifest warns of; nothing where it is missing or cannot be read."""
        with contextlib.suppress(NotOursError):
            return warnings_in(self._storage.read_if_exists(MANIFEST) or b"")
        return ()

    def read_plan(self) -> PlanRecord:
        """The folder's plan.json. Raises OutputError where the folder is no job's output."""
        self._refuse_file()
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            there = "is not a job's output: it has no " + PLAN if self._storage.kind() else "does not exist"
            raise OutputError(f"output {self._shown} {there}")
        return self._parse_plan(data)

    def read_parts(self) -> dict[FileInfo, Totals]:
        """The parts of the job in this folder; needs no plan. Raises OutputError as read_status."""
        return self._read_totals(self.read_plan().fingerprint.digest)

    def read_status(self, parts: Mapping[FileInfo, Totals] | None = None) -> Status:
        """How far the job in this folder is; needs no plan. Raises OutputError where the folder is no job's output.

        `parts`: from read_parts, where the caller has them.
        """
        plan = self.read_plan()
        digest = plan.fingerprint.digest
        parts = self._read_totals(digest) if parts is None else parts
        totals = sum(parts.values(), Totals())
        complete = (totals.rows, len(parts)) == (plan.rows, plan.units) and self.is_complete()
        finished = self.finished_at() if complete else None
        return Status(
            totals.rows,
            plan.rows,
            len(parts),
            plan.units,
            totals,
            complete,
            digest,
            plan.created,
            finished,
            rows_saved=self.count_saved(digest),
            driver=newest_driver(self._storage),
            warnings=self.warnings() if complete else (),
        )

    # Inside.

    def _parts(self) -> list[FileInfo]:
        return self._storage.list_files("", PARTS)

    def _segments(self) -> list[FileInfo]:
        return Storage(f"{self.path.rstrip('/')}/{SEGMENTS}").find()

    def _finished_rows(self) -> list[str]:
        """Names of the files that hold rows."""
        return [part.name for part in self._parts()] or [f"{SEGMENTS}/{segment.name}" for segment in self._segments()]

    def count_saved(self, digest: str) -> int:
        """Rows in the segments, of the job with this fingerprint, of units without a part."""
        # listed before the parts, so that a unit that is published meanwhile is not counted
        if not (segments := self._segments()):
            return 0
        published = {part.name for part in self._parts()}
        open_units = [each for each in segments if part_name(each.name.partition("/")[0]) not in published]

        def read(segment: FileInfo) -> int:
            # gone meanwhile, or not this job's: it saves nothing
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
        """The rows of all segments are in parts, and what a killed writer left half written is there by now. What
        cannot be removed is left to `clean`."""

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
            return read_plan(data)
        except NotOursError as error:
            raise OutputError(
                f"output {self._shown}: {PLAN} cannot be read: {error}; use another output.path or delete it"
            ) from None

    def _refuse_taken(self, plan: Plan) -> None:
        """Raises OutputError where another run has taken the folder meanwhile, with other settings or input."""
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            return
        self._refuse_settings(there := self._parse_plan(data), plan)
        if (change := listing_change(there.files, plan.listing)).any:
            raise OutputError(
                f"output {self._shown} is another run's by now, whose input files differ: {change}; "
                "submit the job again"
            )

    def _refuse_settings(self, old: PlanRecord, plan: Plan) -> None:
        """Raises OutputError where the folder's plan is of other settings."""
        if found := differences(old.fingerprint.fields, plan.fingerprint.fields):
            listing = listing_change(old.files, plan.listing)
            said = "; ".join([*([f"input files: {listing}"] if listing.any else []), *found])
            raise OutputError(
                f"output {self._shown} belongs to another job; what differs (there -> here): {said}. "
                "Use another output.path or delete it"
            )

    def _refuse_input(self, old: PlanRecord, plan: Plan, *, extend: bool) -> None:
        """Raises OutputError where the folder's plan is over other input files; with `extend` there may be more now."""
        change = listing_change(old.files, plan.listing)
        if change.any and not (extend and change.only_added):
            remedy = "set input.on_change: extend to take them" if change.only_added else "put the input back"
            raise OutputError(
                f"output {self._shown} was planned over other input files: {change}; {remedy}, "
                "or use another output.path"
            )

    def _read_totals(self, digest: str) -> dict[FileInfo, Totals]:
        """Of each part of the job with this fingerprint; one that cannot be read or is not its own counts as not done.

        Without a plan the units are not known, but a part of the same fingerprint under its own name is one of them.
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
    return old.fingerprint.digest == plan.fingerprint.digest and old.files == plan.listing


def read_status(output_path: str) -> Status:
    """How far the job in an output folder is. Raises OutputError where the folder is no job's output."""
    return Ledger(output_path).read_status()
