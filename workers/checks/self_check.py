"""Checks a loaded model before its replica takes work.

1. The kernels are compared with their definitions in float64 (model.checks.kernels).
2. The completions are compared with canary.json beside the weights (model.checks.canary). If there is no canary.json,
   only finite logits are required.
"""

import gc
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.checkpoint.reader import open_checkpoint
from pipeline.checks.canary_file import (
    CanaryCase,
    CanaryFile,
    canary_url,
    read_canary,
    remedy,
)
from pipeline.core.errors import CheckpointError, RequestError
from pipeline.storage.urls import safe_url
from workers.checks.canary import PROMPTS, SHOWN

if TYPE_CHECKING:
    from model import TwoTower
    from model.checkpoint.tokenizer import Tokenizer
    from model.checks.canary import Case


def self_check(pair: "TwoTower", tokenizer: "Tokenizer", checkpoint: str) -> str:
    """Check the model and return one line about what was checked. The GPU memory used for it is freed again.

    Raises KernelError, CheckpointError (also if canary.json is broken or belongs to another checkpoint), StorageError.
    """
    import torch

    from model.checks.canary import check_finite
    from model.checks.kernels import check_kernels

    started = time.monotonic()
    canary = read_canary(checkpoint)
    check_kernels(pair)
    if canary is None:
        try:
            check_finite(pair, _encoded(tokenizer, PROMPTS))
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {safe_url(checkpoint)} failed the self-check: {error}") from error
        compared = "logits are finite (no canary.json to compare completions with)"
    else:
        _check_canary(pair, tokenizer, checkpoint, canary)
        compared = f"{len(canary.prompts)} prompts of canary.json agree"
    if torch.cuda.is_available():  # the memory plan that follows counts free memory
        gc.collect()
        torch.cuda.empty_cache()
    return f"self-check passed in {time.monotonic() - started:.1f} s: kernels are right, {compared}"


def _check_canary(pair: "TwoTower", tokenizer: "Tokenizer", checkpoint: str, canary: CanaryFile) -> None:
    from model.checks.canary import SETTINGS, check_cases

    where = safe_url(canary_url(checkpoint))
    if canary.settings != dict(SETTINGS):
        raise CheckpointError(f"{where} was made with other settings, {canary.settings}; {remedy(checkpoint)}")
    if canary.largest_id() >= pair.config.vocab_size:
        raise CheckpointError(
            f"{where} holds token id {canary.largest_id()}, the checkpoint's vocabulary has {pair.config.vocab_size}: "
            f"it is another checkpoint's; {remedy(checkpoint)}"
        )
    encoded = tokenizer.encode_batch([prompt.text for prompt in canary.prompts])
    for prompt, ids in zip(canary.prompts, encoded, strict=True):
        if list(prompt.ids) != ids:
            raise CheckpointError(
                f"checkpoint {safe_url(checkpoint)}: its tokenizer.json gives other tokens for {prompt.text[:SHOWN]!r} "
                f"than {where} has: put the right tokenizer.json there, or {remedy(checkpoint)}"
            )
    try:
        check_cases(pair, [_case(canary, case) for case in canary.cases], canary.dtype, canary.rounding)
    except (CheckpointError, RequestError) as error:
        raise CheckpointError(
            f"checkpoint {safe_url(checkpoint)} is not what {where} expects: {error}; {_diagnosis(checkpoint, canary)}"
        ) from error


def _diagnosis(checkpoint: str, canary: CanaryFile) -> str:
    identity = open_checkpoint(checkpoint).identity()
    if identity == canary.checkpoint:
        return (
            "its files look like those that canary.json was made from: copy the weights again (of large shards only "
            "samples are compared), try another node, or look at what is new in this version"
        )
    return (
        f"canary.json was made from other files (identity {canary.checkpoint[:12]}, here {identity[:12]}): copy the "
        f"weights again if they should be the same, else {remedy(checkpoint)}"
    )


def _encoded(tokenizer: "Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    return [ids for ids in tokenizer.encode_batch(prompts) if ids]


def _case(canary: CanaryFile, case: CanaryCase) -> "Case":
    from model.checks.canary import Case

    fields = case.model_dump(exclude={"prompt"})
    return Case(prompt_ids=canary.prompts[case.prompt].ids, **fields)
