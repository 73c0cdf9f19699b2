"""Prepares a calibration without loading the model: checks the job and the folder for the results, and draws the
sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.calibration.choice import Workload
from pipeline.calibration.options import GPU_PRICE, Options
from pipeline.calibration.results import record
from pipeline.calibration.results.folder import Folder, folder_for
from pipeline.calibration.sample import Sample, draw_sample
from pipeline.config.job import Job
from pipeline.core.errors import CheckpointError
from pipeline.output.begun import plan_job
from pipeline.planning.checkpoint import check_checkpoint, load_tokenizer
from pipeline.planning.plan import Plan
from pipeline.prompts.encoder import PromptEncoder

SEED = 0
"""Seed of the sample. It is fixed, so that every run draws the same rows and earlier measurements can be used again."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that a calibration needs before a replica is started: checked inputs, the sample, and the folder."""

    job: Job
    """The job as the user gave it."""
    measured: Job
    """The job as it is measured: in diffusion mode, so that both towers are loaded, and with the max_new_tokens of the
    options if that is lower."""
    options: Options
    plan: Plan
    sample: Sample
    folder: Folder
    workload: Workload
    identity: Mapping[str, Any]
    """The values that the measurements depend on, by name, except those of the replica (see record.identity)."""
    eos_ids: tuple[int, ...]
    """Token ids that end a row."""


def prepare(job: Job, options: Options) -> Setup:
    """Check all that can be checked without loading the model, and draw the sample. Nothing is written.

    Raises CheckpointError if the checkpoint is unusable or lacks a tower, JobError or InputError if the job, the folder
    or the input cannot be used, OutputError if the folder holds something else, StorageError if the storage fails.
    """
    measured = _as_measured(job, options)
    try:
        checkpoint = check_checkpoint(measured)
    except CheckpointError as error:
        if job.generation.mode != "ar":
            raise
        raise CheckpointError(f"calibrate compares AR with diffusion and needs both towers: {error}") from error
    folder = Folder(folder_for(job, options.to))
    plan = plan_job(job, checkpoint)
    params = measured.generation.params(checkpoint.config.eos_token_ids)
    room = measured.engine.limits().row_tokens(checkpoint.config.max_position_embeddings)
    sample = draw_sample(
        job, plan, PromptEncoder(load_tokenizer(checkpoint), plan.prompts), params, room, options.sample, SEED
    )
    identity = record.identity(measured, plan, sample, checkpoint.identity())
    folder.check(identity)
    gpus, replicas = job.workers.gpus, job.workers.replicas
    workload = Workload(
        rows=round(plan.rows * sample.good_share),
        replicas=None if replicas == "auto" else int(replicas),
        gpus=gpus,
        price=GPU_PRICE if options.price is None and gpus else options.price,
        currency=options.currency,
        extra_tokens=job.generation.max_new_tokens - measured.generation.max_new_tokens,
    )
    return Setup(job, measured, options, plan, sample, folder, workload, identity, params.eos_ids)


def _as_measured(job: Job, options: Options) -> Job:
    tokens = min(job.generation.max_new_tokens, options.max_new_tokens or job.generation.max_new_tokens)
    changed = {"mode": "diffusion", "max_new_tokens": tokens}
    return job.model_copy(update={"generation": job.generation.model_copy(update=changed)})
