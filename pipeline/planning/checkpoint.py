"""Checks that a replica could load the job's checkpoint, from its headers, without loading the weights."""

from weakref import WeakKeyDictionary

from model.checkpoint.reader import Checkpoint, open_checkpoint
from model.checkpoint.tokenizer import Tokenizer
from pipeline.config.job import Job
from pipeline.core.errors import CheckpointError, JobError, RequestError
from pipeline.storage.urls import safe_url

_TOKENIZERS: WeakKeyDictionary[Checkpoint, Tokenizer] = WeakKeyDictionary()
"""The tokenizers that were read, as long as their checkpoints are in use: a large one takes seconds to read."""


def check_checkpoint(job: Job) -> Checkpoint:
    """Open the job's checkpoint, check from its headers that a replica could load it, and return it.

    Raises CheckpointError if a replica could not load it, JobError if a limit of the job is above what the checkpoint's
    context allows or leaves no room for a prompt.
    """
    checkpoint = open_checkpoint(job.model.checkpoint)
    checkpoint.validate(job.generation.towers)
    load_tokenizer(checkpoint)
    limits = job.engine.limits()
    try:
        room, remedy = limits.context_tokens(checkpoint.config.max_position_embeddings), "lower it"
    except RequestError as error:  # its message begins with the name of the setting
        raise JobError(f"engine.{error}") from None
    if limits.kv_tokens is not None and limits.kv_tokens < room:
        room, remedy = limits.kv_tokens, "lower it or raise engine.kv_tokens"
    if job.generation.max_new_tokens >= room:
        raise JobError(
            f"generation.max_new_tokens is {job.generation.max_new_tokens:,}, and prompt and completion together may "
            f"have {room:,} tokens: no prompt would fit; {remedy}"
        )
    return checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return the checkpoint's tokenizer, which is read once. Raises CheckpointError if it has none."""
    if (known := _TOKENIZERS.get(checkpoint)) is not None:
        return known
    raw = checkpoint.tokenizer_json()
    if raw is None:
        raise CheckpointError(
            f"checkpoint {safe_url(checkpoint.uri)} has no tokenizer.json: prompts cannot be turned into tokens"
        )
    tokenizer = _TOKENIZERS[checkpoint] = Tokenizer(raw)
    return tokenizer
