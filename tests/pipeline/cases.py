"""Provides small inputs, jobs over them, and runs of them with made-up completions, for the tests of the pipeline."""

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.requests import Completion
from pipeline.config.job import Job
from pipeline.core.types import Piece, Row, RowResult, Totals, UnitResult, WorkUnit
from pipeline.input.unit_reader import UnitData, UnitReader
from pipeline.output.begun import read_begun
from pipeline.output.ledger import Ledger
from pipeline.output.part import result_table
from pipeline.output.unit_store import UnitStore
from pipeline.planning.cost import prompt_columns
from pipeline.planning.packing import StoredUnits
from pipeline.planning.plan import Plan, make_plan
from pipeline.prompts.setup import PromptSetup

CHECKPOINT = "checkpoint-1"


def write(path: Path, *, group: int | None = None, **columns: Any) -> Path:
    """Write a Parquet file with these columns and `group` rows per row group. Return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def prompts(rows: int, first: int = 0) -> list[str]:
    return [f"prompt {i}" for i in range(first, first + rows)]


def not_utf8(*values: bytes | None) -> "pa.Array[Any]":
    """Return a string column with any bytes, as a writer leaves it that does not check for valid UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def make_job(input_path: Path | str, output_path: Path | str, **sections: dict[str, Any]) -> Job:
    """Return a job. Keyword arguments such as input={"carry": ["a"]} are put into its sections."""
    base: dict[str, dict[str, Any]] = {
        "input": {"path": str(input_path)},
        "output": {"path": str(output_path)},
        "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Job.model_validate(base)


def plan_of(job: Job) -> Plan:
    """Return the plan of a job, with the units that its output holds already."""
    begun, stored = read_begun(job)
    return make_plan(job, checkpoint_identity=CHECKPOINT, begun=begun, stored=stored)


def one_piece(
    unit_id: str,
    file: str,
    name: str,
    first_row: int,
    rows: int,
    size: int = -1,
    stamp: str = "",
    *,
    expected_work: float = 0.0,
) -> WorkUnit:
    """Return a unit of one piece."""
    return WorkUnit(unit_id, (Piece(file, name, first_row, rows, size, stamp),), expected_work)


def with_piece(unit: WorkUnit, number: int = 0, **fields: Any) -> WorkUnit:
    """Return the unit with other values in one of its pieces."""
    pieces = [replace(piece, **fields) if index == number else piece for index, piece in enumerate(unit.pieces)]
    return replace(unit, pieces=tuple(pieces))


def reader_of(job: Job) -> UnitReader:
    """Return a reader of the job's units, without planning the job: every free name of a template is a column."""
    settings = job.input
    columns = prompt_columns(settings)
    return UnitReader(settings, PromptSetup(columns, settings.template), keep_prompt=job.output.keep_prompt)


def with_stamp(unit: WorkUnit, stamp: str) -> WorkUnit:
    """Return the unit as if all its files had this stamp."""
    return replace(unit, pieces=tuple(replace(piece, stamp=stamp) for piece in unit.pieces))


def complete_row(row: Row, attempt: int = 1) -> RowResult:
    """Return the result that an engine would give: three tokens in one block, or an error row if the row has an
    error."""
    if row.error is not None:
        done = Completion(key=row.key, finish_reason="error", error=row.error, latency_s=0.0)
    else:
        done = Completion(
            key=row.key,
            token_ids=(7, 8, 9),
            text=f"answer to {row.prompt}",
            finish_reason="length" if row.index % 2 else "stop",
            prompt_tokens=len(row.prompt or ""),
            denoiser_forwards=2,
            steps_per_block=(2,),
            latency_s=0.5,
        )
    return RowResult(row.index, done, "diffusion", attempt, "replica-0")


def part_of(data: UnitData, plan: Plan, attempt: int = 1) -> bytes:
    results = result_table(data.unit, [complete_row(row, attempt) for row in data.rows])
    store = store_of(make_job("/nowhere", "/nowhere"), plan)
    return store.make_part(data, [results], writer=uuid.uuid4().hex, attempt=attempt, seconds=1.0)


def store_of(job: Job, plan: Plan, digest: str | None = None) -> UnitStore:
    """Return the job's store; `digest`: the fingerprint of another job."""
    return UnitStore(job, digest or plan.fingerprint.digest, plan.schema, plan.prompts, "replica-0")


def open_ledger(job: Job, plan: Plan) -> Ledger:
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    ledger.open(plan, job)
    return ledger


def publish(job: Job, plan: Plan, units: tuple[WorkUnit, ...] | None = None) -> list[UnitResult]:
    """Publish the parts of these units, or of all units of the plan if none are given."""
    store = store_of(job, plan)
    results = [
        store.publish(unit, part_of(store.input.read(unit), plan)) for unit in (plan.units if units is None else units)
    ]
    store.input.close()
    return results


def run(job: Job, plan: Plan | None = None) -> tuple[Plan, Ledger, dict[str, Any]]:
    """Run the whole job: make the plan unless one is given, publish the parts and write the manifest."""
    plan = plan or plan_of(job)
    ledger = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    return plan, ledger, ledger.complete(plan, job, totals, seconds=2.0)


def two_files(folder: Path) -> Job:
    """Make a job over two files with 25 rows in three units. One id occurs three times, one id is null, and two prompts
    are bad."""
    write(folder / "in/a.parquet", prompt=prompts(20), key=[*range(19), 3])
    write(folder / "in/b.parquet", prompt=["x", None, "", "y", "z"], key=[3, 30, None, 31, 32])
    return make_job(folder / "in", folder / "out", output={"rows_per_file": 10}, input={"id_column": "key"})


PACKED_ROWS = {"a": 3, "b": 1, "c": 4, "d": 25, "e": 2, "f": 1}
"""The files of packed_files, without `.parquet`, and their numbers of rows."""


def packed_files(folder: Path, **sections: dict[str, Any]) -> Job:
    """Make a job over the files PACKED_ROWS, with at most ten rows in a unit.

    Its units are three of file d, one of a, b, c and e together, and one of f. Row 1 of a, c and d has no prompt, and
    neither has row 0 of e. The prompt of row 2 of c is empty.
    """
    number = 0
    for name, rows in PACKED_ROWS.items():
        texts: list[str | None] = [*prompts(rows, number)]
        if name in "acd":
            texts[1] = None
        texts[0] = None if name == "e" else texts[0]
        texts[2:3] = [""] if name == "c" else texts[2:3]
        write(folder / f"in/{name}.parquet", prompt=texts, n=list(range(number, number + rows)))
        number += rows
    sections = {"output": {"rows_per_file": 10}, "input": {"carry": ["n"]}, **sections}
    return make_job(folder / "in", folder / "out", **sections)


def plan_by_old_rules(job: Job) -> Plan:
    """Return the plan of a job as earlier versions made it: no unit has rows of several files."""
    return make_plan(job, checkpoint_identity=CHECKPOINT, stored=StoredUnits(rules=1))


def out(job: Job, name: str = "") -> Path:
    """Return the path of a file in the job's local output folder."""
    return Path(job.output.path) / name


def load(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value
