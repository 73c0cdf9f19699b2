"""Makes a new job from the error rows of an output (`retry-errors OUTPUT --to FOLDER`).

FOLDER/input gets the input rows of these error rows, unchanged. FOLDER/job.yaml gets the settings of the old job, but
without a limit on the error rate. The new job writes to FOLDER/output. The rows keep their ids, so that the new results
can be joined to the old ones.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.config.job import Job
from pipeline.config.writer import to_yaml, without_variables
from pipeline.core.errors import InputError, OutputError
from pipeline.core.text import counted, one_line
from pipeline.core.types import Piece
from pipeline.input.files import list_input, would_read
from pipeline.input.parquet_rows import RowStream
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import PARTS
from pipeline.output.ledger import Ledger
from pipeline.output.part import to_parquet
from pipeline.output.records import NotOursError, read_part
from pipeline.planning.fingerprint import listing_change
from pipeline.planning.plan import InputFile, Plan, make_plan
from pipeline.storage.storage import FileInfo, Storage, real_path
from pipeline.storage.urls import is_inside, is_local, safe_url

THREADS = 16
ROWS_A_FILE, BYTES_A_FILE = 50_000, 64 << 20
"""A file of the new input is written as soon as it has this many rows or bytes in memory."""
READ_ROWS = 1024
"""Largest range of rows to read from a file at once; it includes rows that did not fail."""
REASONS = 5
"""Maximum number of error texts in RetryJob.reasons."""
_REASONS_KEPT = 10_000
"""Number of different error texts that are counted; rows with any further text count as `other errors`."""
_NUMBER = re.compile(r"\d[\d,.]*\d|\d")

RowNumbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RetryJob:
    """The new job that was written. If no row failed, `rows` is 0 and nothing was written."""

    rows: int
    """Number of rows of the new job: the error rows of the old one."""
    reasons: tuple[tuple[str, int], ...]
    """The REASONS most frequent errors as (error text with N for every number, number of rows)."""
    job_file: str
    """Path or URL of the new job file, even if none was written."""
    units_left: int
    """Number of units of the old job that have no part yet. Rows that fail in them are not in the new job."""


@dataclass(slots=True)
class _Failed:
    """The error rows found in an output."""

    rows: dict[str, list[RowNumbers]]
    """Row numbers by input file, one array per batch that was read; only files with error rows."""
    reasons: Counter[str]
    """Number of rows by error text, with N for every number in it."""
    parts: int
    """Number of parts that were read."""


def make_retry_job(output_path: str, folder: str) -> RetryJob:
    """Write a new job of the error rows in `output_path` to `folder`, which must be empty or must not exist yet.

    Raises OutputError if the output cannot be read or the folder cannot be used, InputError if an input file with
    error rows cannot be read or is not as it was when the job was planned, and StorageError if the storage fails.
    """
    folder = os.path.abspath(os.path.expanduser(folder)) if is_local(folder) else folder.rstrip("/")
    record = Ledger(output_path).read_plan()
    job = _job_of(output_path, record)
    target = _empty_folder(folder, output_path)
    failed = _find_failed(output_path, record)
    rows = sum(len(numbers) for chunks in failed.rows.values() for numbers in chunks)
    job_file, units_left = f"{folder}/job.yaml", record.units - failed.parts
    if rows:
        plan = _plan_again(job, record, folder, failed.rows.keys())
        id_column = job.input.id_column or _free_name(job.input.columns_with(plan.prompts.columns))
        retry = _settings(job, folder, id_column)
        writer = _Writer(target)
        for file in plan.files:
            if file.name in failed.rows:
                for table in _read_rows(job, file, np.sort(np.concatenate(failed.rows[file.name])), plan, id_column):
                    writer.add(table)
        writer.flush()
        # written last: without this file the folder is not taken for a job
        comment = f"{counted(rows, 'row')} of a job that failed; made by retry-errors"
        target.write("job.yaml", to_yaml(without_variables(retry), [comment]))
    return RetryJob(rows, tuple(failed.reasons.most_common(REASONS)), job_file, units_left)


def _job_of(output_path: str, record: PlanRecord) -> Job:
    """Return the settings of the old job from its plan. Raises OutputError if this version cannot read them."""
    try:
        return Job.model_validate(record.job)
    except ValidationError as error:
        raise OutputError(
            f"output {safe_url(output_path)}: the job settings in its plan cannot be read: "
            f"{error.errors()[0]['msg']}; write the new job file by hand"
        ) from None


def _empty_folder(folder: str, output_path: str) -> Storage:
    """Return the storage of the folder. Raises OutputError if it holds anything or lies inside the output."""
    shown, target = safe_url(folder), Storage(folder)
    if target.kind() not in (None, "folder") or target.find():
        raise OutputError(f"{shown} is not an empty folder: give a new one")
    if is_inside(real_path(folder), real_path(output_path)):
        raise OutputError(f"{shown} lies inside output {safe_url(output_path)}: give a folder elsewhere")
    return target


def _find_failed(output_path: str, record: PlanRecord) -> _Failed:
    """Read the error rows of all parts. Raises OutputError if a part cannot be read or is another job's."""
    storage = Storage(output_path)

    def read(part: FileInfo) -> tuple[list[tuple[str, RowNumbers]], Counter[str]]:
        rows: list[tuple[str, RowNumbers]] = []
        reasons: Counter[str] = Counter()
        try:
            with storage.open(part.name, part.size) as source:
                about, totals = read_part(source)
                if about.fingerprint != record.fingerprint.digest:
                    raise NotOursError("it is another job's part")
                columns = ["finish_reason", "error", "source_file", "source_row"]
                known = {piece.file for piece in about.pieces}
                batches = pq.ParquetFile(source, page_checksum_verification=True).iter_batches(
                    columns=columns, use_threads=False
                )
                for batch in batches if totals.errors else ():
                    bad = batch.filter(pc.equal(batch["finish_reason"], pa.scalar("error")))
                    for file, numbers in _by_file(bad):
                        if file not in known:
                            raise NotOursError(f"it has rows of {file}, which its record does not name")
                        rows.append((file, numbers))
                    reasons.update(_NUMBER.sub("N", str(text)) for text in bad["error"].to_pylist())
        except (NotOursError, pa.ArrowException, OSError) as error:
            raise OutputError(
                f"output {safe_url(output_path)}: {part.name}: {one_line(error)}; run `verify`"
            ) from error
        return rows, reasons

    found = _Failed({}, Counter(), 0)
    by_file: dict[str, list[RowNumbers]] = defaultdict(list)
    with ThreadPoolExecutor(THREADS) as pool:
        for rows, reasons in pool.map(read, [part for part in storage.list_files("", PARTS) if part.size]):
            found.parts += 1
            for file, numbers in rows:
                by_file[file].append(numbers)
            for text, count in reasons.items():
                known = text in found.reasons or len(found.reasons) < _REASONS_KEPT
                found.reasons[text if known else "other errors"] += count
    found.rows = dict(by_file)
    return found


def _by_file(rows: pa.RecordBatch) -> Iterator[tuple[str, RowNumbers]]:
    """Yield (file, row numbers) for each run of rows that are of the same file."""
    files = rows["source_file"].dictionary_encode()
    numbers = rows["source_row"].to_numpy()
    edges = np.flatnonzero(np.diff(files.indices.to_numpy())) + 1
    for first, run in zip([0, *edges.tolist()], np.split(numbers, edges), strict=True):
        if len(run):
            yield str(files[first]), run


def _plan_again(job: Job, record: PlanRecord, folder: str, needed: Collection[str]) -> Plan:
    """Return a plan of the old job over its input as it is now. `needed`: the names of the files with error rows.

    Raises InputError if one of these files was changed or removed, OutputError if `folder` lies inside the input.
    """
    identity = str(record.fingerprint.fields.get("model.checkpoint"))
    plan = make_plan(job, checkpoint_identity=identity, allow_unreadable=True)
    change = listing_change(record.listing, plan.listing)
    if lost := [name for name in (*change.rewritten, *change.removed) if name in needed]:
        raise InputError(
            f"input {safe_url(job.input.path)}: {counted(len(lost), 'file')} with rows that failed, such as {lost[0]}, "
            "changed or disappeared after the job was planned; put back what was there"
        )
    if would_read(job.input.path, list_input(job.input.path)[0], f"{folder}/input"):
        raise OutputError(f"{safe_url(folder)} lies inside input {safe_url(job.input.path)}: give a folder elsewhere")
    return plan


def _free_name(columns: Sequence[str]) -> str:
    """Return a name that is not in `columns`, for the column that gets the ids which the old job generated."""
    name = "original_id"
    while name in columns:
        name += "_"
    return name


def _read_rows(job: Job, file: InputFile, rows: RowNumbers, plan: Plan, id_column: str) -> Iterator[pa.Table]:
    """Yield these rows of a file as tables of at most READ_ROWS rows. `rows`: row numbers in ascending order.

    The tables have the job's input columns. If the job itself has no id column, they also have `id_column`, with the
    ids `<file>#<row>` that the job generated. Raises InputError if
    the file cannot be decoded.
    """
    columns = job.input.columns_with(plan.prompts.columns)
    types = {name: plan.schema.field(name).type for name in job.input.carry}
    if job.input.prompt_column is not None:
        types[job.input.prompt_column] = pa.string()
    if job.input.id_column is not None:
        types[job.input.id_column] = plan.schema.field("id").type
    stream = RowStream(Piece(file.url, file.name, 0, file.rows, file.size, file.stamp), columns)
    try:
        for near in np.split(rows, np.flatnonzero(np.diff(rows // READ_ROWS)) + 1):
            first, last = int(near[0]), int(near[-1])
            # take() copies the rows; a slice would keep all rows around it in memory
            table = stream.take(first, last - first + 1).take(near - first)
            # A column that holds only nulls in this file may have another type in another file. Bytes stay bytes,
            # because they may not be text.
            kept = {name: table[name].type for name in columns if pa.types.is_binary(table[name].type)}
            made = {name: table[name].cast({**types, **kept}.get(name, table[name].type)) for name in columns}
            if job.input.id_column is None:
                made[id_column] = pa.chunked_array([[f"{file.name}#{row}" for row in near]])
            yield pa.table(made)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"input {safe_url(file.url)} cannot be decoded: {one_line(error)}") from error
    finally:
        stream.close()


class _Writer:
    """A writer of the new job's input: it collects rows and writes them into Parquet files of bounded size."""

    def __init__(self, target: Storage) -> None:
        self._target = target
        self._tables: list[pa.Table] = []
        self._rows = self._bytes = self._files = 0

    def add(self, table: pa.Table) -> None:
        """Add rows. If their columns differ from those collected, or the file is full, write what is collected."""
        if self._tables and self._tables[0].schema != table.schema:  # the template's columns may differ between files
            self.flush()
        self._tables.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._rows >= ROWS_A_FILE or self._bytes >= BYTES_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows, if there are any, as one file."""
        if self._tables:
            data = to_parquet(pa.concat_tables(self._tables))
            self._target.write(f"input/rows-{self._files:05d}.parquet", data)
            self._files += 1
            self._tables, self._rows, self._bytes = [], 0, 0


def _settings(job: Job, folder: str, id_column: str) -> dict[str, Any]:
    """Return the settings of the new job: those of the old one, with paths in `folder` and no limit on error rows."""
    settings = job.model_dump(mode="json")
    settings["name"] = f"{job.name or 'job'}-retry"
    settings["input"] |= {"path": f"{folder}/input", "id_column": id_column}
    settings["output"]["path"] = f"{folder}/output"
    settings["retry"]["max_error_rate"] = 1.0  # these rows failed once, and failing again must not end the job
    return Job.model_validate(settings).model_dump(mode="json")
