"""`python -m tests.benchmarks.resume [FOLDER or URL]`: measures planning, resuming, reporting and verifying at scale.

Makes 10,000,000 prompts in 2,000 files and the output of a job over them (2,000 parts: first half of them, then all).
Each step runs in a process of its own; its seconds and peak resident MiB are printed. Without an argument it works in a
temporary folder on the local disk. A folder or URL is used as it is and not removed afterwards; credentials and
endpoint come from the usual AWS variables.
"""

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.schema import RESULT_SCHEMA
from pipeline.core.types import Totals, UnitResult, WorkUnit
from pipeline.maintenance.verify import verify
from pipeline.output.layout import REPORT
from pipeline.output.ledger import Ledger
from pipeline.output.part import TOTALS_KEY, to_parquet
from pipeline.output.records import RECORD_KEY, PartRecord, commit_record, to_json, unit_fields
from pipeline.planning.fingerprint import listing_change
from pipeline.planning.plan import Plan, make_plan
from pipeline.report.write import write_report
from pipeline.storage.storage import Storage

FILES, ROWS_A_FILE = 2_000, 5_000
WRITERS = 16
REPLICAS = 8
CHARS = 200
NOISE = random.Random(0).randbytes(4 << 20).hex()
"""Random text from which completions are cut, so that parts do not compress to almost nothing."""
Step = Callable[[str], str]


def job_in(folder: str) -> Job:
    return Job.model_validate(
        {
            "input": {"path": f"{folder}/in"},
            "output": {"path": f"{folder}/out", "rows_per_file": ROWS_A_FILE},
            "model": {"checkpoint": "builtin:noise"},
        }
    )


def plan_in(folder: str) -> Plan:
    return make_plan(job_in(folder), checkpoint_identity="none")


def make_part(unit: WorkUnit, plan: Plan) -> tuple[bytes, PartRecord, Totals]:
    """Return a part as a replica would publish it, with its record and totals, without generating single rows."""
    rows, number = unit.row_count, plan.units.index(unit)
    (piece,) = unit.pieces
    numbers = np.arange(piece.first_row, piece.first_row + rows)
    values: dict[str, Any] = {
        "completion": [NOISE[start : start + CHARS] for start in numbers * 997 % (len(NOISE) - CHARS)],
        "finish_reason": ["length"] * rows,
        "mode": ["diffusion"] * rows,
        "replica": ["r0"] * rows,
        "source_file": [piece.name] * rows,
        "source_row": numbers,
        "error": pa.nulls(rows),
        "repetition": np.zeros(rows),
        "latency_s": np.random.default_rng(number).gamma(4, 2, rows),
        "steps_per_block": [[3, 5, 2, 7]] * rows,
    }
    columns = {f.name: values.get(f.name, np.ones(rows)) for f in RESULT_SCHEMA}
    table = pa.table({"id": [f"{piece.name}#{number}" for number in numbers], **columns}).cast(plan.schema)
    totals = Totals(rows, rows, 0, rows, rows, rows, finish_reasons={"length": rows})
    record = PartRecord(
        **unit_fields(unit, plan.prompts.rules),
        fingerprint=plan.fingerprint.digest,
        writer="w",
        replica=f"r{number % REPLICAS}",
        attempt=1,
        seconds=float(REPLICAS),
        published=f"2026-01-01T00:{number // 60:02}:{number % 60:02}+00:00",
    )
    header = {RECORD_KEY: json.dumps(record.model_dump()), TOTALS_KEY: json.dumps(asdict(totals))}
    return to_parquet(table.replace_schema_metadata(header)), record, totals


def write_input(folder: str) -> str:
    table = pa.table({"prompt": [f"prompt number {number}" for number in range(ROWS_A_FILE)]})
    data, storage = to_parquet(table), Storage(f"{folder}/in")
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda number: storage.write(f"{number:04}.parquet", data), range(FILES)))
    return f"{FILES * ROWS_A_FILE:,} rows in {FILES:,} files"


def write_parts(folder: str, which: slice) -> str:
    plan, storage = plan_in(folder), Storage(f"{folder}/out")
    Ledger(f"{folder}/out", plan.fingerprint.digest).open(plan, job_in(folder))

    def publish(unit: WorkUnit) -> int:
        data, record, totals = make_part(unit, plan)
        result = UnitResult(unit.id, totals, record.seconds, sha256(data).hexdigest(), record.replica, 1)
        storage.write(f"part-{unit.id}.parquet", data)
        storage.write(f"_job/units/{unit.id}.json", to_json(commit_record(record, result, len(data))))
        return len(data)

    with ThreadPoolExecutor(WRITERS) as pool:
        sizes = list(pool.map(publish, plan.units[which]))
    return f"{len(sizes):,} parts, {sum(sizes) / 2**20:,.0f} MiB"


def write_first_half(folder: str) -> str:
    return write_parts(folder, slice(None, FILES // 2))


def write_other_half(folder: str) -> str:
    return write_parts(folder, slice(FILES // 2, None))


def measure_plan(folder: str) -> str:
    plan = plan_in(folder)
    return f"{plan.rows:,} rows, {len(plan.units):,} units"


def measure_resume(folder: str) -> str:
    """Measure all that a run does before it hands out its first unit."""
    began = time.perf_counter()
    plan, job = plan_in(folder), job_in(folder)
    planned = time.perf_counter()
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    ledger.open(plan, job)
    opened = time.perf_counter()
    results = ledger.finished(plan)
    found = time.perf_counter()
    return (
        f"{len(results):,} of {len(plan.units):,} units are done; plan {planned - began:.2f} s, "
        f"open {opened - planned:.2f} s, finished parts {found - opened:.2f} s"
    )


def measure_listing(folder: str) -> str:
    """Measure how a run notices that an input file was added, and is refused."""
    plan = plan_in(folder)
    storage = Storage(f"{folder}/in")
    storage.write("9999.parquet", storage.read("0000.parquet"))
    changed = plan_in(folder)
    began = time.perf_counter()
    change = listing_change(plan.listing, changed.listing)
    compared = time.perf_counter()
    try:
        Ledger(f"{folder}/out", changed.fingerprint.digest).open(changed, job_in(folder))
    except OutputError as error:
        said = str(error)
    refused = time.perf_counter()
    storage.remove("9999.parquet")
    assert change.added == ("9999.parquet",)
    assert "9999.parquet is new" in said
    return f"comparing {(compared - began) * 1e3:.1f} ms, the refusal {refused - compared:.2f} s"


def measure_complete(folder: str) -> str:
    plan, job = plan_in(folder), job_in(folder)
    totals = Totals(plan.rows, plan.rows, 0, plan.rows, plan.rows, plan.rows, finish_reasons={"length": plan.rows})
    Ledger(job.output.path, plan.fingerprint.digest).complete(plan, job, totals, seconds=1.0)
    return "the manifest, with planning"


def measure_report(folder: str) -> str:
    return f"{write_report(f'{folder}/out')}, {len(Storage(f'{folder}/out').read(REPORT)):,} bytes"


def measure_verify(folder: str) -> str:
    found = verify(f"{folder}/out")
    assert not found.problems, found.problems[:3]
    return found.summary()


STEPS: dict[str, Step] = {
    "write input": write_input,
    "plan": measure_plan,
    "write half": write_first_half,
    "resume, half done": measure_resume,
    "write the rest": write_other_half,
    "resume, all done": measure_resume,
    "input changed": measure_listing,
    "complete": measure_complete,
    "report": measure_report,
    "verify": measure_verify,
}


def run_step(name: str, folder: str) -> None:
    """Run one step, in a process of its own, and print its time and memory."""
    began = time.perf_counter()
    said = STEPS[name](folder)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name:18} {seconds:7.2f} s {peak:6} MiB  {said}", flush=True)


def run_all(folder: str) -> None:
    for name in STEPS:
        process = multiprocessing.get_context("spawn").Process(target=run_step, args=(name, folder))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} failed")


def main() -> None:
    if len(sys.argv) > 1:
        run_all(sys.argv[1].rstrip("/"))
        return
    with tempfile.TemporaryDirectory(prefix="twotower-resume-") as folder:
        run_all(folder)


if __name__ == "__main__":
    main()
