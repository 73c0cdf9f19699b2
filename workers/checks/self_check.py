"""Checks a loaded model before its replica takes work.

1. The kernels are compared with their definitions in float64 (model.checks.kernels).
2. The completions are compared with canary.json beside the weights (model.checks.canary). If there is no canary.json,
   only finite logits are required.
"""

import gc
import time
from typing import TYPE_CHECKING

from pipeline.checks.canary_file import read_canary
from pipeline.core.errors import CheckpointError
from pipeline.core.text import counted
from pipeline.storage.urls import safe_url
from workers.checks.canary import PROMPTS, check_canary

if TYPE_CHECKING:
    from model import TwoTower
    from model.checkpoint.tokenizer import Tokenizer


def self_check(pair: "TwoTower", tokenizer: "Tokenizer", checkpoint: str) -> str:
    """Check the kernels, then the completions of canary.json, or only that logits are finite if the checkpoint has no
    canary.json.

    Return one line about what was checked. The GPU memory that the checks used is free again afterwards. Raises
    KernelError, CheckpointError (also if canary.json is broken or belongs to another checkpoint) and StorageError.
    """
    import torch

    from model.checks.canary import check_finite
    from model.checks.kernels import check_kernels

    started = time.monotonic()
    canary = read_canary(checkpoint)
    check_kernels(pair)
    if canary is None:
        try:
            check_finite(pair, [ids for ids in tokenizer.encode_batch(PROMPTS) if ids])
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {safe_url(checkpoint)} failed the self-check: {error}") from error
        compared = "logits are finite (no canary.json to compare completions with)"
    else:
        check_canary(pair, tokenizer, checkpoint, canary)
        compared = f"{counted(len(canary.prompts), 'prompt')} of canary.json as expected"
    if torch.cuda.is_available():  # the memory plan that follows counts free memory
        gc.collect()
        torch.cuda.empty_cache()
    return f"self-check passed in {time.monotonic() - started:.1f} s: kernels are correct, {compared}"
