"""The driver's side of the output folder: whose it is, what is finished, what it all adds up to.

Parts are the truth; commit records are written after them and made again from their footers where missing or broken;
then come the manifest and, last, `_SUCCESS`.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.commit import check_part, write_record
from pipeline.duplicates import find_duplicates
from pipeline.errors import OutputError
from pipeline.fingerprint import LISTING_FIELD, differences
from pipeline.job import Job
from pipeline.layout import MANIFEST, PARTS, PLAN, RECORDS, SUCCESS, part_name, record_name
from pipeline.manifest import (
    NotOursError,
    PlanRecord,
    Status,
    differing_files,
    finished_at,
    manifest_fields,
    plan_fields,
    read_commit,
    read_part,
    read_plan,
    to_json,
)
from pipeline.paths import safe_url
from pipeline.plan import Plan
from pipeline.storage import FileInfo, Storage, check_writable
from pipeline.types import Totals, UnitResult, WorkUnit

READ_THREADS = 16


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
        """Takes the folder for this job, or refuses: not writable, another job's, parts of unknown origin.

        The plan of another job that never published a part is replaced: there is nothing to protect.
        """
        old = self.check(plan)
        if old is None:
            check_writable(self.path)
            if self._storage.create(PLAN, to_json(plan_fields(plan, job))):
                return
            old = self.check(plan)  # another run of this job, or of another one, was faster
        if old is None or old.fingerprint.digest != plan.fingerprint.digest:
            check_writable(self.path)
            self._storage.write(PLAN, to_json(plan_fields(plan, job)))
        elif not self.is_complete():
            check_writable(self.path)

    def check(self, plan: Plan) -> PlanRecord | None:
        """The folder's plan.json; writes nothing. Raises OutputError where the folder cannot be this job's."""
        self._refuse_file()
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            if parts := self._parts():
                raise OutputError(
                    f"output {self._shown} holds {len(parts)} part file(s) such as {parts[0].name} but no {PLAN}: "
                    "they are of unknown origin; use another output.path or delete it"
                )
            return None
        old = self._read_plan(data)
        if old.fingerprint.digest != plan.fingerprint.digest and self._parts():
            self._refuse_other(old, plan)
        return old

    def finished(self, plan: Plan, *, repair: bool = True) -> dict[str, UnitResult]:
        """The units that have a part, by id. A commit record that is missing or broken is written again, if `repair`.

        Every part's footer is read, never its data: this finds a part that is truncated, replaced or of another job,
        and raises OutputError naming it. Damage inside the data of a part of the right size is not found here.
        """
        planned = {part_name(unit.id): unit for unit in plan.units}
        parts = self._parts()
        for part in parts:
            if part.name not in planned:
                raise OutputError(f"output {self._shown}: {part.name} is no part of this job's plan: delete it")
        recorded = {record.name.rpartition("/")[2] for record in self._storage.list_files(RECORDS, "*.json")}

        def read(part: FileInfo) -> UnitResult:
            unit = planned[part.name]
            with self._storage.open(part.name, part.size) as source:
                record, totals = check_part(self._shown, self._digest, unit, source)
            known = self._from_record(unit, part, totals) if f"{unit.id}.json" in recorded else None
            if known is not None:
                return known
            digest = self._storage.sha256(part.name, part.size) if repair else ""
            result = UnitResult(unit.id, totals, record.seconds, digest, record.replica, record.attempt)
            if repair:
                write_record(self._storage, record, result, part.size)
            return result

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return {result.unit_id: result for result in pool.map(read, parts)}

    def complete(self, plan: Plan, job: Job, totals: Totals, *, seconds: float) -> dict[str, Any]:
        """Writes the manifest, then `_SUCCESS`, and returns the manifest. `seconds`: wall clock of the run.

        Raises OutputError where a unit has no part or the totals do not cover all rows: the job is not complete then.
        """
        if (old := self._storage.read_if_exists(PLAN)) is not None:  # another job may have taken the folder meanwhile
            self._refuse_other(self._read_plan(old), plan)
        parts = self._parts()
        missing = len({part_name(unit.id) for unit in plan.units} - {part.name for part in parts})
        if missing or totals.rows != plan.rows:
            raise OutputError(
                f"output {self._shown} is not complete: {missing} of {len(plan.units)} parts are missing and "
                f"{totals.rows} of {plan.rows} rows are counted: submit the job again"
            )
        # Ids that the pipeline makes itself (file and row) cannot repeat.
        given = job.input.id_column is not None
        duplicates, examples = find_duplicates(self._storage, parts, plan.rows) if given else (0, ())
        manifest = manifest_fields(plan, job, totals, duplicates, examples, seconds)
        self._storage.write(MANIFEST, to_json(manifest))
        self._storage.write(SUCCESS, b"")
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

    def read_status(self) -> Status:
        """How far the job in this folder is; needs no plan. Raises OutputError where the folder is no job's output."""
        self._refuse_file()
        data = self._storage.read_if_exists(PLAN)
        if data is None:
            there = "is not a job's output: it has no " + PLAN if self._storage.kind() else "does not exist"
            raise OutputError(f"output {self._shown} {there}")
        plan = self._read_plan(data)
        digest = plan.fingerprint.digest
        parts = self._read_totals(digest)
        totals = sum(parts, Totals())
        complete = (totals.rows, len(parts)) == (plan.rows, plan.units) and self.is_complete()
        finished = self.finished_at() if complete else None
        return Status(totals.rows, plan.rows, len(parts), plan.units, totals, complete, digest, plan.created, finished)

    # Inside.

    def _parts(self) -> list[FileInfo]:
        return self._storage.list_files("", PARTS)

    def _refuse_file(self) -> None:
        if self._storage.kind() == "file":
            raise OutputError(f"output {self._shown} is a file: give a folder")

    def _read_plan(self, data: bytes) -> PlanRecord:
        try:
            return read_plan(data)
        except NotOursError as error:
            raise OutputError(
                f"output {self._shown}: {PLAN} cannot be read: {error}; use another output.path or delete it"
            ) from None

    def _refuse_other(self, old: PlanRecord, plan: Plan) -> None:
        if old.fingerprint.digest == plan.fingerprint.digest:
            return
        found = differences(old.fingerprint.fields, plan.fingerprint.fields)
        if old.fingerprint.fields.get(LISTING_FIELD) != plan.fingerprint.fields[LISTING_FIELD]:
            found.insert(0, differing_files(old.files, plan))
        raise OutputError(
            f"output {self._shown} belongs to another job; what differs (there -> here): {'; '.join(found)}. "
            "Use another output.path or delete it"
        )

    def _from_record(self, unit: WorkUnit, part: FileInfo, totals: Totals) -> UnitResult | None:
        """The result in a commit record; None where the record is broken or does not say what the part says."""
        try:
            result, size = read_commit(self._storage.read_if_exists(record_name(unit.id)) or b"")
        except NotOursError:
            return None
        if (result.unit_id, result.totals) != (unit.id, totals):
            return None
        if size != part.size:
            raise OutputError(
                f"output {self._shown}: {part.name} is truncated or replaced: it has {part.size} bytes, {size} were "
                "published; delete it to have its rows generated again"
            )
        return result

    def _read_totals(self, digest: str) -> list[Totals]:
        """Of each part of the job with this fingerprint; one that cannot be read or is not its own counts as not done.

        Without a plan the units are not known, but a part of the same fingerprint under its own name is one of them.
        """

        def read(part: FileInfo) -> Totals | None:
            with contextlib.suppress(NotOursError), self._storage.open(part.name, part.size) as source:
                record, totals = read_part(source)
                if (part_name(record.unit), record.fingerprint) == (part.name, digest):
                    return totals
            return None

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return [totals for totals in pool.map(read, self._parts()) if totals is not None]


def read_status(output_path: str) -> Status:
    """How far the job in an output folder is. Raises OutputError where the folder is no job's output."""
    return Ledger(output_path).read_status()
