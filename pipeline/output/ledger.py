"""Manages the output folder for the driver: which job it belongs to, which units are finished, and the final totals.

A unit is finished if its part exists. Its commit record is written after the part, and again from the part if it is
missing. When all units are finished, the manifest is written and, last, `_SUCCESS`. If plan.json is lost, it is made
again from parts and segments that agree with the job (pipeline.output.found_units).
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.config.job import Job
from pipeline.core.errors import JobFailed, OutputError, StorageError
from pipeline.core.schema import SCHEMA_VERSION
from pipeline.core.text import counted
from pipeline.core.types import Totals, UnitResult
from pipeline.output.claim import newest_driver
from pipeline.output.duplicate_ids import find_duplicates
from pipeline.output.found_units import FoundUnits, disagreement, look
from pipeline.output.job_records import ManifestRecord, PlanRecord, Status, manifest_fields, plan_fields, plan_json
from pipeline.output.layout import (
    JOB,
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
from pipeline.output.records import NotOursError, OtherSchemaError, other_schema, read_part, to_json
from pipeline.output.segments import read_record
from pipeline.output.unit_store import PUT_BACK, check_part, write_record
from pipeline.planning.fingerprint import PROMPT_RULES, differences, listing_change
from pipeline.planning.packing import spans_of
from pipeline.planning.plan import Plan
from pipeline.storage.parallel import call_each
from pipeline.storage.storage import FileInfo, Storage
from pipeline.storage.urls import safe_url

READ_THREADS = 16
"""The number of files that are read or removed at the same time."""
HALF_WRITTEN = (("", ".part-*.tmp"), (RECORDS, ".*.tmp"))
"""Files that a killed writer of a part or a record leaves on a local disk: (folder, pattern)."""
WRITES = 3
"""The number of times that a file is written which is not there after the store has confirmed its write."""
MISSING = "is missing"
"""The text about a plan.json that does not exist."""
_log = logging.getLogger(__name__)


class Ledger:
    """The records of one output folder: its plan, its parts with their commit records, and its manifest.

    All methods raise StorageError if the storage fails.
    """

    def __init__(self, output_path: str, fingerprint_digest: str | None = None) -> None:
        """Open the folder for the job with this fingerprint digest; with None, call only methods that take no Plan."""
        self.path = output_path
        self._digest = fingerprint_digest
        self._storage = Storage(output_path)
        self._inside = Storage(output_path, anchor=JOB)
        """For writing once the folder is this job's: a folder that was removed since then is not created again."""
        self._shown = safe_url(output_path)
        self._lost: tuple[str, FoundUnits] | None = None
        """If `check` found rows and no readable plan.json: what is wrong with it, and the units that they are of."""

    # For the driver, before and after the run.

    def open(self, plan: Plan, job: Job) -> None:
        """Check that the folder can be this job's, and write its plan.json unless it holds this plan already.

        The plan of another job is replaced if that job never saved a row, because nothing is lost. With
        `input.on_change: extend`, the plan is replaced by one with more files. In both cases `_SUCCESS` is removed
        first. A plan that is lost, although there are rows of this job, is written again, and a warning is logged.
        Raises OutputError if the folder cannot be written to, or as `check` does.
        """
        old = self.check(plan, job)
        if old is None:
            check_writable(self.path)
            if self._storage.create(PLAN, plan_json(self._plan_fields(plan, job))):
                self._tell_of_lost_plan()
                return
            old = self.check(plan, job)  # it cannot be read, or another run of this job, or of another one, was faster
        if old is None or not _same(old, plan):
            check_writable(self.path)
            fields = self._plan_fields(plan, job)
            # Checked again right before the plan is replaced, because with many files all this has taken seconds.
            old = self.check(plan, job)
            if old is not None and _same(old, plan):
                return
            if old is not None and old.fingerprint == plan.fingerprint:
                fields["created"] = old.created
            if self._lost is None:
                self.reopen()
            self._storage.write(PLAN, plan_json(fields))
            self._tell_of_lost_plan()
        elif not self.is_complete():
            check_writable(self.path)

    def check(self, plan: Plan, job: Job) -> PlanRecord | None:
        """Return the folder's plan.json, or None if there is none that can be read; write nothing.

        Raises OutputError if the folder cannot be this job's: it is a file, or it holds finished rows of a job with
        other settings, or of other input files (new files are allowed with `input.on_change: extend`). Without a
        plan.json that can be read, parts and segments tell that, and all of them must agree with this job.
        """
        self._refuse_file()
        old, self._lost = self._read_plan(), None
        if isinstance(old, str):
            if self._finished_rows():
                self._refuse_found(old, plan, job)
            return None
        if not _same(old, plan) and self._finished_rows():
            self._refuse_settings(old, plan)
            self._refuse_input(old, plan, extend=job.input.on_change == "extend")
        self._refuse_units(old, plan)
        return old

    def look(self) -> FoundUnits:
        """Return the units that parts and segments name, for a folder whose plan.json is lost."""
        return look(self._storage)

    def finished(self, plan: Plan, *, repair: bool = True) -> dict[str, UnitResult]:
        """Return the results of the units that have a part, by unit id. With `repair`, missing commit records are
        written again, and those of parts that are gone are removed.

        Only the footer of each part is read, not its data, and of a commit record only its name in the listing. The
        `sha256` of a result is therefore empty unless the commit record was written again, for which the whole part is
        read. Raises OutputError with the name of the part if one is truncated, of another job, of another version of
        its input file or not in the plan. Only `verify` finds damaged data and a commit record that does not fit its
        part.
        """
        planned = {part_name(unit.id): unit for unit in plan.units}
        # Records are listed first: one that is there then and has no part afterwards is not just being published.
        found = self._storage.list_files(RECORDS, "*.json")
        parts = self._parts()
        for part in parts:
            if part.name not in planned:
                raise OutputError(f"output {self._shown}: {self._unplanned(part)}")
        records = {record.name for record in found if record.size}
        if repair:  # the record of a part that somebody has deleted would not fit the part that takes its place
            there = {part.name for part in parts}
            gone = (record_name(unit.id) for name, unit in planned.items() if name not in there)
            self._remove([name for name in gone if name in records])

        def read(part: FileInfo) -> UnitResult:
            unit = planned[part.name]
            with self._storage.open(part.name, part.size) as source:
                record, totals = check_part(self._storage, self._digest, unit, source)
            missing = repair and record_name(unit.id) not in records
            digest = self._storage.sha256(part.name, part.size) if missing else ""
            result = UnitResult(unit.id, totals, record.seconds, digest, record.replica, record.attempt)
            if missing:
                write_record(self._inside, record, result, part.size)
            return result

        return {result.unit_id: result for result in call_each(read, parts, READ_THREADS)}

    def complete(
        self,
        plan: Plan,
        job: Job,
        totals: Totals,
        *,
        seconds: float,
        warnings: Sequence[str] = (),
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Write the manifest, then `_SUCCESS`, remove the segments and return the content of the manifest.

        `seconds`: wall-clock time of the run. `warnings`: texts for the manifest. `check` (Claim.check_now) is called
        before and after each write, and raises JobFailed if another driver has taken over the job or the folder is
        gone. Ids that repeat are counted if the job names an id column. Raises OutputError, and writes nothing, if a
        unit has no part, a part is not in the plan, `totals` do not have all rows of the plan, the data of a part is
        damaged, or another run has replaced the plan in the folder. Raises StorageError if the store confirms a write
        again and again, and the file is not there.
        """
        check()
        self.confirm_plan(plan, job)
        parts = self._parts()
        planned = {part_name(unit.id) for unit in plan.units}
        missing = len(planned - {part.name for part in parts})
        if unknown := [part.name for part in parts if part.name not in planned]:
            raise OutputError(f"output {self._shown}: {unknown[0]} is no part of this job's plan: submit the job again")
        if missing or totals.rows != plan.rows:
            raise OutputError(
                f"output {self._shown} is not complete: missing parts: {missing} of {len(plan.units)}; "
                f"finished rows: {totals.rows} of {plan.rows}; submit the job again"
            )
        # Ids that the pipeline makes itself (file and row) cannot repeat.
        given = job.input.id_column is not None
        duplicates, examples = find_duplicates(self._storage, parts, plan.rows) if given else (0, ())
        manifest = manifest_fields(plan, job, totals, duplicates, examples, seconds, warnings)
        check()
        self.confirm_plan(plan, job)  # checked again, because reading all ids takes long
        self._write(MANIFEST, to_json(manifest), check)
        check()
        self._write(SUCCESS, b"", check)
        try:
            check()
        except JobFailed:
            self._withdraw(to_json(manifest))
            raise
        self.confirm_plan(plan, job)
        self._sweep(plan)
        return manifest

    def confirm_plan(self, plan: Plan, job: Job) -> None:
        """Write plan.json again if it has been lost or damaged since `open`.

        Raises OutputError if another run, with other settings, input files or units, has replaced it, and StorageError
        if it is not there after it was written.
        """
        there = self._read_plan()
        if isinstance(there, str):
            _log.warning("output %s: %s %s; it is written again", self._shown, PLAN, there)
            self._write(PLAN, plan_json(plan_fields(plan, job)), lambda: None)
        else:
            self._refuse_taken(there, plan)

    def last_plan(self) -> PlanRecord | None:
        """Return the folder's plan.json; None if there is none or it cannot be read."""
        found = self._read_plan() if self._storage.kind() == "folder" else None
        return found if isinstance(found, PlanRecord) else None

    def has_rows(self) -> bool:
        """Return whether the folder holds finished rows. All parts are listed for that."""
        return bool(self._finished_rows())

    def is_complete(self) -> bool:
        """Return whether `_SUCCESS` exists."""
        return self._storage.exists(SUCCESS)

    def completed(self, plan: Plan) -> ManifestRecord | None:
        """Return the manifest if `_SUCCESS` exists; None if it does not, or if the manifest is that of another plan.

        A driver that another one replaced may have left such a `_SUCCESS`.
        """
        if not self.is_complete():
            return None
        manifest = self.read_manifest()
        return manifest if manifest.agrees(plan.fingerprint.digest, plan.rows, len(plan.units)) else None

    def reopen(self) -> None:
        """Remove `_SUCCESS`, if it exists. The job is then not complete until `complete` writes the file again."""
        if self.is_complete():
            self._storage.remove(SUCCESS)

    def read_manifest(self) -> ManifestRecord:
        """Return the manifest; if it is missing or cannot be read, a ManifestRecord with its defaults."""
        with contextlib.suppress(NotOursError):
            return ManifestRecord.read(self._storage.read_if_exists(MANIFEST) or b"")
        return ManifestRecord()

    def read_plan(self) -> PlanRecord:
        """Return the folder's plan.json.

        Raises OutputError if the folder is not a job's output: plan.json is missing or cannot be read.
        """
        self._refuse_file()
        if not isinstance(found := self._read_plan(), str):
            return found
        if rows := self._finished_rows():
            raise OutputError(
                f"output {self._shown}: {PLAN} {found}, but there {'is' if len(rows) == 1 else 'are'} "
                f"{counted(len(rows), 'file')} with finished rows, such as {rows[0]}; nothing is lost: let a run of "
                "the job that is under way finish, or submit the same job again, which makes the plan again from them"
            )
        if found != MISSING:
            raise OutputError(f"output {self._shown}: {PLAN} {found}: submit the job again, which writes it anew")
        there = "is not a job's output: it has no " + PLAN if self._storage.kind() else "does not exist"
        raise OutputError(f"output {self._shown} {there}")

    def read_parts(self) -> dict[FileInfo, Totals]:
        """Return the totals of each part of the folder's job, without a Plan.

        A part that cannot be read or belongs to another job is left out. Raises OutputError if the folder is not a
        job's output.
        """
        return self._read_totals(self.read_plan().fingerprint.digest)

    def read_status(self, parts: Mapping[FileInfo, Totals] | None = None) -> Status:
        """Return the progress of the folder's job, without a Plan.

        `parts`: the result of read_parts, if the caller has it already; None to read the parts now. Raises OutputError
        if the folder is not a job's output.
        """
        plan = self.read_plan()
        digest = plan.fingerprint.digest
        parts = self._read_totals(digest) if parts is None else parts
        totals = sum(parts.values(), Totals())
        complete = (totals.rows, len(parts)) == (plan.rows, plan.units) and self.is_complete()
        manifest = self.read_manifest() if complete else ManifestRecord()
        complete = complete and manifest.agrees(digest, plan.rows, plan.units)
        return Status(
            totals.rows,
            plan.rows,
            len(parts),
            plan.units,
            totals,
            complete,
            digest,
            plan.created,
            manifest.finished if complete else None,
            rows_saved=self.count_saved(digest),
            driver=newest_driver(self._storage),
            warnings=manifest.warnings if complete else (),
        )

    # Helpers.

    def _parts(self) -> list[FileInfo]:
        """Return the parts. An empty one is the name that a killed writer took on a file system without hard links."""
        return [part for part in self._storage.list_files("", PARTS) if part.size]

    def _segments(self) -> list[FileInfo]:
        return Storage(f"{self.path.rstrip('/')}/{SEGMENTS}").find()

    def _finished_rows(self) -> list[str]:
        """Return the names of the files that hold finished rows: the parts, or the segments if there is no part."""
        parts = [part.name for part in self._parts()]
        return parts or [f"{SEGMENTS}/{segment.name}" for segment in self._segments() if segment.size]

    def count_saved(self, digest: str) -> int:
        """Return the number of rows in segments of units without a part, for the job with this fingerprint digest.

        A row that two attempts saved counts twice. A segment that cannot be read counts no rows.
        """
        # The segments are listed before the parts, so that a unit that is published meanwhile is not counted.
        if not (segments := self._segments()):
            return 0
        published = {part.name for part in self._parts()}
        open_units = [each for each in segments if part_name(each.name.partition("/")[0]) not in published]

        def read(segment: FileInfo) -> int:
            # A segment that is gone by now or belongs to another job holds no saved rows.
            with (
                contextlib.suppress(NotOursError, StorageError),
                self._storage.open(f"{SEGMENTS}/{segment.name}", segment.size) as source,
            ):
                record, rows = read_record(source)
                return rows if record.fingerprint == digest else 0
            return 0

        return sum(call_each(read, open_units, READ_THREADS))

    def _sweep(self, plan: Plan) -> None:
        """Remove the segments of the plan's units and what killed writers left half written, once all rows are in
        parts. A file that cannot be removed is left to `clean`."""

        units = {unit.id for unit in plan.units}
        with contextlib.suppress(StorageError):
            names = [f"{SEGMENTS}/{file.name}" for file in self._segments() if file.name.partition("/")[0] in units]
            for folder, pattern in HALF_WRITTEN:
                names += [file.name for file in self._storage.list_files(folder, pattern)]
            self._remove(names)

    def _write(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        """Write a file and read it back, and write it again if the store has lost it although it confirmed the write.

        `check` raises if another driver may have written the file meanwhile.
        """
        for _ in range(WRITES):
            self._inside.write(name, data)
            if self._storage.read_if_exists(name) == data:
                return
            check()
        raise StorageError(
            f"output {self._shown}: {name} is not there as it was written, though the store confirmed {WRITES} writes: "
            "check the store and submit the job again"
        )

    def _withdraw(self, manifest: bytes) -> None:
        """Remove the `_SUCCESS` that this driver has just written, because another one owns the folder by now.

        It stays if the job is complete by that driver's plan, or if that driver has written its own manifest and thus
        writes `_SUCCESS` next. `manifest`: the one that this driver has written.
        """
        with contextlib.suppress(OutputError, StorageError):
            if not self.read_status().complete and self._storage.read_if_exists(MANIFEST) in (manifest, None):
                self.reopen()

    def _remove(self, names: Sequence[str]) -> None:
        """Remove these files, but leave those that cannot be removed."""

        def remove(name: str) -> None:
            with contextlib.suppress(StorageError):
                self._storage.remove(name)

        if names:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                list(pool.map(remove, names))

    def _refuse_file(self) -> None:
        if self._storage.kind() == "file":
            raise OutputError(f"output {self._shown} is a file: give a folder")

    def _read_plan(self) -> PlanRecord | str:
        """Return the folder's plan.json, or what is wrong with it, in words that follow its name."""
        data = self._storage.read_if_exists(PLAN)
        if not data:  # an empty one is the name that a killed writer took on a file system without hard links
            return MISSING if data is None else "is empty"
        try:
            return PlanRecord.read(data)
        except NotOursError as error:
            return f"cannot be read: {error}"

    def _plan_fields(self, plan: Plan, job: Job) -> dict[str, Any]:
        """Return the content of plan.json. If that was lost, the time when the first part was published is `created`,
        as nothing tells when the job first ran."""
        return plan_fields(plan, job, self._lost[1].began if self._lost else "")

    def _tell_of_lost_plan(self) -> None:
        """Log a warning if the plan that was just written takes the place of a lost one."""
        if self._lost is not None:
            said, found = self._lost
            _log.warning(
                "output %s: %s %s; it was made again, and the finished rows of %s are kept",
                *(self._shown, PLAN, said, counted(len(found.records), "unit")),
            )

    def _refuse_found(self, said: str, plan: Plan, job: Job) -> None:
        """Raise OutputError if parts and segments do not agree with this job. `said`: what is wrong with plan.json."""
        found = look(self._storage)
        why, done = disagreement(found, plan), self.read_manifest()
        known = done.files if done.fingerprint == plan.fingerprint.digest else None
        if why is None and known and known < len(plan.files) and job.input.on_change != "extend":
            why = (
                f"the job was complete with {counted(known, 'input file')}, and there are {len(plan.files)} now: set "
                "input.on_change: extend to add the new ones, or use another output.path"
            )
        if why is not None:
            raise OutputError(
                f"output {self._shown}: {PLAN} {said}, and it cannot be made again from parts and segments: {why}"
            )
        self._lost = said, found

    def _unplanned(self, part: FileInfo) -> str:
        """Return what is wrong with a part that is none of the plan's units, and what to do."""
        try:
            with self._storage.open(part.name, part.size) as source:
                record, _ = read_part(source)
        except OtherSchemaError as error:
            return f"{part.name} {error}"
        except NotOursError as error:
            return f"{part.name} is no part of this job's plan, and is broken: {error}; move it away"
        if record.fingerprint != self._digest:
            return f"{part.name} is another job's part: move it away and submit the job again"
        return (
            f"{part.name} is no part of this job's plan, though it holds rows of this job ({record.pieces[0]}); "
            f"{PUT_BACK}"
        )

    def _refuse_taken(self, there: PlanRecord, plan: Plan) -> None:
        """Raise OutputError if the folder's plan is that of another run, with other settings, input files or units."""
        self._refuse_settings(there, plan, taken=True)
        if (change := listing_change(there.listing, plan.listing)).any:
            raise OutputError(
                f"output {self._shown} belongs to another run by now, whose input files differ: {change}; "
                "submit the job again"
            )
        self._refuse_units(there, plan)

    def _refuse_units(self, old: PlanRecord, plan: Plan) -> None:
        """Raise OutputError if another run of this job has stored other units since this run was planned."""
        if old.fingerprint.digest != plan.fingerprint.digest or not old.packing:
            return
        planned = {spans_of(unit) for unit in plan.units}
        same = {name for name, file in plan.listing.items() if old.listing.get(name) == file}
        if any(unit not in planned and all(span.file in same for span in unit) for unit in old.units_stored):
            raise OutputError(
                f"output {self._shown}: another run of this job has added input files meanwhile: submit the job again"
            )

    def _refuse_settings(self, old: PlanRecord, plan: Plan, *, taken: bool = False) -> None:
        """Raise OutputError if the folder's plan has other settings. `taken`: it has replaced the plan of this run."""
        if (schema := old.fingerprint.fields.get("output schema version", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise OutputError(f"output {self._shown} {other_schema(schema)}")
        if PROMPT_RULES not in old.fingerprint.fields and PROMPT_RULES in plan.fingerprint.fields:
            raise OutputError(
                f"output {self._shown} was begun by an earlier version, whose templates made other prompts (of nulls, "
                "last line ends, tojson and control tokens): finish it with that version, or use another output.path"
            )
        if found := differences(old.fingerprint.fields, plan.fingerprint.fields):
            listing = listing_change(old.listing, plan.listing)
            said = "; ".join([*([f"input files: {listing}"] if listing.any else []), *found])
            raise OutputError(
                f"output {self._shown} belongs to another job{' by now' if taken else ''}; what differs (there -> "
                f"here): {said}. {'That job took the folder, and this driver ends' if taken else _ELSEWHERE}"
            )

    def _refuse_input(self, old: PlanRecord, plan: Plan, *, extend: bool) -> None:
        """Raise OutputError if the folder's plan has other input files; with `extend`, new files are allowed."""
        change = listing_change(old.listing, plan.listing)
        if change.any and not (extend and change.only_added):
            remedy = (
                "set input.on_change: extend to add them" if change.only_added else "put the same files back (cp -p)"
            )
            raise OutputError(
                f"output {self._shown} was planned over other input files: {change}; {remedy}, "
                "or use another output.path"
            )

    def _read_totals(self, digest: str) -> dict[FileInfo, Totals]:
        """Return the totals of each part of the job with this fingerprint digest.

        A part that cannot be read, belongs to another job or does not have its own unit's name is left out. This needs
        no Plan: the record in the part names the job and the unit.
        """

        def read(part: FileInfo) -> Totals | None:
            with contextlib.suppress(NotOursError), self._storage.open(part.name, part.size) as source:
                record, totals = read_part(source)
                if (part_name(record.unit), record.fingerprint) == (part.name, digest):
                    return totals
            return None

        parts = self._parts()
        found = zip(parts, call_each(read, parts, READ_THREADS), strict=True)
        return {part: totals for part, totals in found if totals is not None}


_ELSEWHERE = "Use another output.path"


def _same(old: PlanRecord, plan: Plan) -> bool:
    """Return True if both have the same settings and the same input files."""
    return old.fingerprint.digest == plan.fingerprint.digest and old.listing == plan.listing


def read_status(output_path: str) -> Status:
    """Return the progress of the job in an output folder. Raises OutputError if the folder is not a job's output."""
    return Ledger(output_path).read_status()
