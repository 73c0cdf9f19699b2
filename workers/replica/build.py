"""Makes what a replica consists of, from its job: the loaded model, the engine, the store of units and the runner."""

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
from pipeline.prompts.encoder import PromptEncoder
from pipeline.prompts.setup import PromptSetup
from workers.checks.self_check import self_check
from workers.units.counts import engine_room
from workers.units.runner import UnitRunner

if TYPE_CHECKING:
    from model import Engine, TwoTower
    from model.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """The job and the results of its planning that a replica needs to load the model and to save its rows.

    All replicas of a job get the same one. It is sent to their processes, so it must be picklable.
    """

    job: Job
    fingerprint: str
    """The digest of the plan's fingerprint, which identifies the job in its output folder."""
    schema: pa.Schema
    """The schema of every part."""
    prompts: PromptSetup
    """How prompts are made."""
    json_logs: bool = False
    """True if replicas are to log JSON lines (pipeline.monitoring.logs)."""

    def open_store(self, replica: str) -> UnitStore:
        """Return the store through which the replica of this name reads and saves units.

        Raises StorageError if a URL of the job cannot be used.
        """
        return UnitStore(self.job, self.fingerprint, self.schema, self.prompts, replica)


def make_runner(spec: ReplicaSpec, replica: str) -> UnitRunner:
    """Load the job's model, check it, make an engine on it, and return the runner of the replica of this name.

    Raises what `load_pair`, the self-check, `make_engine` and `ReplicaSpec.open_store` raise.
    """
    if spec.json_logs and not is_json():  # with --local, this is the driver's process, which has switched it on already
        use_json()
    job = spec.job
    pair, tokenizer = load_pair(job)
    checked = self_check(pair, tokenizer, job.model.checkpoint)
    engine = make_engine(pair, job)
    return UnitRunner(
        engine,
        PromptEncoder(tokenizer, spec.prompts),
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

    The devices are the first `workers.gpus` GPUs that this process sees (Ray limits which these are), or the CPU if
    that number is 0. Also sets the number of torch's threads. Raises JobError if this process sees too few GPUs,
    CheckpointError if the checkpoint cannot be loaded or has no tokenizer, and RequestError if the model cannot be
    loaded with this dtype or on these devices.
    """
    import torch  # imported here, because only a process that builds a runner needs it

    from model import load_model

    torch.set_num_threads(min(job.workers.cpus, os.cpu_count() or 1))
    if job.workers.gpus > (found := torch.cuda.device_count()):  # with --local, or if torch cannot use the driver
        raise JobError(f"workers.gpus is {job.workers.gpus}, but torch finds {found} here; lower it (0: the CPU)")
    devices = [f"cuda:{index}" for index in range(job.workers.gpus)] or ["cpu"]
    pair = load_model(job.model.checkpoint, dtype=job.model.dtype, devices=devices, towers=job.generation.towers)
    if pair.tokenizer is None:
        raise CheckpointError(f"checkpoint {job.model.checkpoint} has no tokenizer.json to read prompts with; add it")
    return pair, pair.tokenizer


def make_engine(pair: "TwoTower", job: Job) -> "Engine":
    """Return an engine on a loaded model with the limits in the job's section `engine`.

    Raises RequestError if the limits do not suit the model, or RequestError or JobError if there is too little memory.
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
