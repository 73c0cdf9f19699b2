"""Builds the parts of a replica from a job: the model, the engine and the store of units."""

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from model.errors import CheckpointError
from model.runtime.device_errors import device_lost
from pipeline.config.job import Job
from pipeline.core.errors import JobError
from pipeline.monitoring.logs import is_json, use_json
from pipeline.output.unit_store import UnitStore
from workers.checks.self_check import self_check
from workers.units.counts import engine_room
from workers.units.runner import UnitRunner

if TYPE_CHECKING:
    from model import Engine, TwoTower
    from model.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """The settings from which a replica is built. A spec is sent to the actor, so it must be picklable."""

    job: Job
    fingerprint: str
    """Digest of the plan's fingerprint, which identifies the job in its output folder."""
    schema: pa.Schema
    """Schema of every part."""
    json_logs: bool = False
    """Whether the replica logs JSON (pipeline.monitoring.logs)."""

    def open_store(self, replica: str) -> UnitStore:
        """Return the store of a replica."""
        return UnitStore(self.job, self.fingerprint, self.schema, replica)


def make_runner(spec: ReplicaSpec, replica: str) -> UnitRunner:
    """Load the job's model, check it, and return a runner for it. `replica`: the name of the replica.

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
        spec.open_store(replica),
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

    Raises RequestError or JobError if the limits do not fit the model or the memory, and the device's own error if the
    device was lost.
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
