"""Builds the parts of a replica from a job: the model, the engine, the reader of units and the writer of parts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from model.errors import CheckpointError
from model.runtime.device_errors import device_lost
from pipeline.config.job import Job
from pipeline.core.errors import JobError
from pipeline.core.types import UnitResult, WorkUnit
from pipeline.input.unit_reader import UnitData, UnitReader
from pipeline.monitoring.logs import is_json, use_json
from pipeline.output.part import build_part
from pipeline.output.publisher import UnitOutput
from pipeline.output.segments import SegmentRows
from workers.checks.self_check import self_check
from workers.units.counts import engine_room
from workers.units.runner import UnitRunner

if TYPE_CHECKING:
    from model import Engine, TwoTower
    from model.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """Everything that a replica needs to know. It is sent to the actor, so it must be picklable."""

    job: Job
    fingerprint: str
    """Digest of the plan's fingerprint, which identifies the job in its output folder."""
    schema: pa.Schema
    """Schema of every part."""
    json_logs: bool = False
    """Whether replicas log JSON (pipeline.monitoring.logs)."""


class PartStore:
    """The runner's UnitStore for one job: it reads units, writes segments and publishes parts."""

    def __init__(self, spec: ReplicaSpec, replica: str) -> None:
        self._reader = UnitReader(spec.job.input)
        self._output = UnitOutput(spec.job.output.path, spec.fingerprint)
        self._schema, self._replica = spec.schema, replica

    def close(self) -> None:
        """See UnitStore."""
        self._reader.close()

    def published(self, unit: WorkUnit) -> UnitResult | None:
        """See UnitStore."""
        return self._output.published(unit)

    def read(self, unit: WorkUnit) -> UnitData:
        """See UnitStore."""
        return self._reader.read(unit)

    def read_segments(self, unit: WorkUnit) -> SegmentRows:
        """See UnitStore."""
        return self._output.read_segments(unit)

    def write_segment(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None:
        """See UnitStore."""
        self._output.write_segment(unit, rows, writer=writer, number=number, attempt=attempt)

    def publish(
        self, data: UnitData, rows: Sequence[pa.Table], *, writer: str, attempt: int, seconds: float
    ) -> UnitResult:
        """See UnitStore. Raises ValueError, which ends the replica, if a row has no result or more than one."""
        header = self._output.header(data.unit, attempt=attempt, replica=self._replica, seconds=seconds, writer=writer)
        part, _ = build_part(data, rows, self._schema, header)
        return self._output.publish(data.unit, part)


def make_runner(spec: ReplicaSpec, replica: str) -> UnitRunner:
    """Load the job's model, check it, and return a runner for it.

    Raises CheckpointError, RequestError, JobError and what the self-check raises.
    """
    if spec.json_logs and not is_json():  # with --local the driver has switched it on already
        use_json()
    job = spec.job
    pair, tokenizer = load_pair(job)
    checked = self_check(pair, tokenizer, job.model.checkpoint)
    engine = make_engine(pair, job)
    return UnitRunner(
        engine,
        tokenizer,
        PartStore(spec, replica),
        job.generation.params(tuple(pair.eos_ids)),
        replica=replica,
        flush=job.flush,
        retry_degenerate=job.generation.on_degenerate == "retry",
        notes=[f"model loaded: {', '.join(map(str, pair.loaded))}", checked, *engine.memory.lines()],
        room=partial(engine_room, engine),
    )


def load_pair(job: Job) -> "tuple[TwoTower, Tokenizer]":
    """Load the job's model on the devices of this process, and return it with its tokenizer.

    The devices are the GPUs that Ray makes visible to this process, from cuda:0 up to the replica's number of GPUs, or
    the CPU. Raises CheckpointError, RequestError and JobError.
    """
    import torch  # imported here, because only a process that builds a runner needs it

    from model import load_model

    torch.set_num_threads(min(job.workers.cpus, os.cpu_count() or 1))
    if job.workers.gpus > (found := torch.cuda.device_count()):  # with --local, or if torch cannot use the driver
        raise JobError(f"workers.gpus is {job.workers.gpus}, but torch finds {found} here; lower it, 0 is the CPU")
    devices = [f"cuda:{index}" for index in range(job.workers.gpus)] or ["cpu"]
    pair = load_model(job.model.checkpoint, dtype=job.model.dtype, devices=devices, towers=job.generation.towers)
    if pair.tokenizer is None:
        raise CheckpointError(f"checkpoint {job.model.checkpoint} has no tokenizer.json: prompts cannot be read")
    return pair, pair.tokenizer


def make_engine(pair: "TwoTower", job: Job) -> "Engine":
    """Return an engine on a loaded model with the job's limits.

    Raises RequestError or JobError if the limits do not fit the model or the memory.
    """
    from model import Engine

    try:
        return Engine(pair, job.engine.limits())
    except (RuntimeError, MemoryError) as error:  # torch raises a plain RuntimeError if host memory runs out
        if device_lost(error):
            raise
        kv_tokens = "null" if job.engine.kv_tokens is None else job.engine.kv_tokens
        raise JobError(
            f"no memory for the context of engine.max_rows {job.engine.max_rows} and engine.kv_tokens {kv_tokens}; "
            f"lower them: {error}"
        ) from error
