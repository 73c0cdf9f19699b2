"""Makes small real jobs over Parquet in a temporary folder, for runners and pools with a fake engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.job import Job
from pipeline.output.ledger import Ledger
from pipeline.planning.plan import Plan, make_plan
from workers.replica.build import ReplicaSpec


@dataclass(frozen=True)
class SmallJob:
    job: Job
    plan: Plan
    ledger: Ledger

    @property
    def spec(self) -> ReplicaSpec:
        return ReplicaSpec(self.job, self.plan.fingerprint.digest, self.plan.schema, self.plan.prompts)

    def rows(self) -> list[dict[str, Any]]:
        """Return all output rows in input order. Fails if a row is there twice."""
        parts = sorted(Path(self.job.output.path).glob("part-*.parquet"))
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
        assert len({row["id"] for row in rows}) == len(rows)
        return sorted(rows, key=lambda row: (row["source_file"], row["source_row"]))


def prompts_of(count: int) -> list[str]:
    """Return prompts of 1 to 60 letters."""
    return [chr(97 + i % 26) * (1 + i * 7 % 60) for i in range(count)]


def write_prompts(path: Path, prompts: Sequence[str | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"prompt": pa.array(prompts, pa.string())}), path, row_group_size=max(10, len(prompts) // 20)
    )


def open_job(folder: Path, prompts: Sequence[str | None] | None, rows_per_file: int = 10, **sections: Any) -> SmallJob:
    """Write the prompts, plan the job and open its output. If `prompts` is None, the input is there already."""
    if prompts is not None:
        write_prompts(folder / "in" / "a.parquet", prompts)
    job = Job.model_validate(
        {
            "name": "small",
            "input": {"path": str(folder / "in")},
            "output": {"path": str(folder / "out"), "rows_per_file": rows_per_file},
            "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
            "workers": {"gpus": 0},
            **sections,
        }
    )
    plan = make_plan(job, checkpoint_identity="fake")
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    ledger.open(plan, job)
    return SmallJob(job, plan, ledger)
