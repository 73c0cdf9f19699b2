"""Reads and writes the folder of a calibration. It keeps all measurements, so that nothing is measured twice.

    calibration.json        what the measurements depend on; then the chosen point and what the job will cost
    measurements.parquet    a row for each point: its settings, its measurements, the cost of the whole job
    completions/*.parquet   a file for each setting: the rows of the sample with their texts
    report.html             the report for people
    job.yaml                the job with the chosen settings

A point counts as measured once it is in measurements.parquet, which is written after the completions.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.calibration.bench import Replica, Speed
from pipeline.calibration.points import Point, Setting
from pipeline.calibration.quality import Answers
from pipeline.calibration.results import record, tables
from pipeline.calibration.sample import SampleRow
from pipeline.config.job import Job
from pipeline.core.errors import InputError, JobError, OutputError
from pipeline.core.text import one_line
from pipeline.input.files import list_input, would_read
from pipeline.output.layout import check_writable
from pipeline.output.part import to_parquet
from pipeline.output.records import NotOursError, from_json, to_json
from pipeline.planning.fingerprint import differences
from pipeline.storage.storage import Storage, real_path
from pipeline.storage.urls import flaw_of, in_ray_package, is_inside, is_local, safe_url

RECORD, MEASUREMENTS, REPORT, JOB_FILE = "calibration.json", "measurements.parquet", "report.html", "job.yaml"
COMPLETIONS = "completions"


def folder_for(job: Job, to: str | None) -> str:
    """Return the path or URL of the folder for a calibration: `to`, or the one beside the job's output if `to` is None.

    Raises JobError if `to` is empty or unusable, if it is None and nothing can lie beside the output, or if the folder
    lies in the output or would be deleted with Ray's working directory. Raises InputError if the folder lies in the
    input or the input is missing, StorageError if the storage fails.
    """
    if to is None:
        beside = default_folder(job)
        if beside is None:
            raise JobError(f"output {safe_url(job.output.path)} has nothing beside it: name a folder with --to")
        folder = beside
    elif not to.strip():  # an unset shell variable; it would mean the current directory
        raise JobError("--to is empty: name a folder")
    elif not is_local(to):
        folder = to.rstrip("/")
    else:
        if in_ray_package(os.getcwd()) and not os.path.isabs(to):
            raise JobError(
                f"--to {to} is relative to Ray's temporary copy of the working directory, which is deleted after the "
                "job: give an absolute path on shared storage or an s3:// URL"
            )
        folder = os.path.abspath(os.path.expanduser(to))
    if why := flaw_of(folder, chains=is_local(folder), pattern=False):
        raise JobError(f"--to {safe_url(folder)}: {why}")
    shown = safe_url(folder)
    if is_inside(real_path(folder), real_path(job.output.path)):
        raise JobError(f"{shown} lies inside output {safe_url(job.output.path)}: name a folder elsewhere with --to")
    if would_read(job.input.path, list_input(job.input.path)[0], folder):
        raise InputError(
            f"{shown} lies inside input {safe_url(job.input.path)}: its files would become input; name a folder "
            "elsewhere with --to"
        )
    return folder


def default_folder(job: Job) -> str | None:
    """Return the folder in which a calibration is by default: the path of the output with `-calibration` added.

    The result is None if the output is a whole disk or bucket, which nothing can lie beside.
    """
    output = job.output.path.rstrip("/")
    root = output.strip("/") if is_local(output) else output.partition("://")[2].partition("/")[2]
    return f"{output}-calibration" if root else None


class Folder:
    """The folder of one calibration. Its methods raise OutputError if the folder holds something else or damaged files,
    and StorageError if the storage fails."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shown = safe_url(path)
        self._storage = Storage(path)

    def check(self, identity: Mapping[str, Any]) -> bool:
        """Return True if this calibration is in the folder already, False if the folder is empty or does not exist.

        `identity`: all values that the measurements depend on, or some of them, by name. Raises OutputError if the
        folder holds a calibration in which one of them differs, or other files.
        """
        data = self._storage.read_if_exists(RECORD)
        if data is None:
            if self._storage.kind() not in (None, "folder") or self._storage.find():
                raise OutputError(
                    f"{self.shown} is not empty and holds no calibration: name an empty folder or a new one with --to"
                )
            return False
        try:
            there = from_json(data).get("measured_with")
        except NotOursError as error:
            raise OutputError(f"{self.shown}/{RECORD} cannot be read: {error}; name another folder (--to)") from None
        if not isinstance(there, dict):
            raise OutputError(f"{self.shown}/{RECORD} is no record of a calibration: use another folder (--to)")
        if found := differences({name: there.get(name) for name in identity}, identity):
            raise OutputError(
                f"{self.shown} holds a calibration that was measured otherwise (there -> here): {'; '.join(found)}; "
                "name another folder with --to"
            )
        return True

    def take(self, identity: Mapping[str, Any], replica: Replica) -> None:
        """Begin a calibration in the folder, or continue the one that is there.

        calibration.json gets these values; the outcome of an earlier run in it stays until `write_record`.
        """
        there = self.check(identity)
        if not there:
            check_writable(self.path)
        self.write_record(identity, replica, from_json(self._storage.read(RECORD)) if there else {})

    def write_record(self, identity: Mapping[str, Any], replica: Replica, outcome: Mapping[str, Any]) -> None:
        """Write calibration.json: what the measurements depend on, the replica, and the fields of the outcome."""
        self.write(RECORD, to_json({**outcome, "measured_with": identity, "replica": asdict(replica)}))

    def read_replica(self) -> Replica | None:
        """Return the replica that the points were measured on, or None if it is not recorded or cannot be read."""
        data = self._storage.read_if_exists(RECORD)
        try:
            return None if data is None else record.replica_from(from_json(data)["replica"])
        except (NotOursError, LookupError, TypeError, ValueError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder, whole or not at all."""
        self._storage.write(name, data)

    def write_measurements(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace measurements.parquet. `rows`: one for each point measured so far, with the columns of
        tables.MEASUREMENTS."""
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=tables.MEASUREMENTS)
        self.write(MEASUREMENTS, to_parquet(table))

    def read_points(self) -> dict[Point, tuple[Speed, str]]:
        """Return the points in measurements.parquet, each with its speed and the time of its measurement; empty if
        there is no such file."""
        table = self._read(MEASUREMENTS)
        if table is None:
            return {}
        try:
            return dict(map(tables.point_of, table.to_pylist()))
        except KeyError as error:
            raise self._damaged(MEASUREMENTS, f"it has no column {error}") from None

    def write_answers(self, setting: Setting, rows: Sequence[SampleRow], answers: Answers) -> None:
        """Write the answers of a setting to the rows of the sample into a file in completions/."""
        self.write(_answers_name(setting), to_parquet(tables.answers_table(rows, answers)))

    def read_answers(self, setting: Setting, rows: Sequence[SampleRow]) -> Answers | None:
        """Return the answers of a setting to the rows of the sample, or None if they have not been written."""
        name = _answers_name(setting)
        table = self._read(name)
        try:
            return None if table is None else tables.answers_of(table, rows)
        except KeyError as error:
            raise self._damaged(name, f"it has no {error}") from None

    def _read(self, name: str) -> pa.Table | None:
        data = self._storage.read_if_exists(name)
        if data is None:
            return None
        try:
            return pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(name, one_line(error)) from error

    def _damaged(self, name: str, why: str) -> OutputError:
        return OutputError(f"{self.shown}/{name} cannot be read: {why}; move the file away to have it measured again")


def _answers_name(setting: Setting) -> str:
    return f"{COMPLETIONS}/{setting.name}.parquet"
