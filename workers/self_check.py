"""What a replica checks of the model that it has loaded, before it takes work; and how canary.json is made.

1. Its kernels against their definitions in float64 (model.kernels.check).
2. canary.json beside the weights, if there is one (model.canary). Without: that logits are finite.
"""

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from model.checkpoint import open_checkpoint
from model.config import Towers
from pipeline.canary_file import (
    CanaryCase,
    CanaryFile,
    CanaryPrompt,
    canary_url,
    read_canary,
    remedy,
    require_free,
    write_canary,
)
from pipeline.errors import CheckpointError, RequestError
from pipeline.paths import is_local, safe_url

if TYPE_CHECKING:
    from model import TwoTower
    from model.canary import Case
    from model.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 4, ",
    '{"name": "Ada", "born": ',
    "A lighthouse is a tower that guides ships at night. Its lamp turns once in ten seconds and is seen from far away.",
)
"""Any tokenizer makes tokens of them; one is longer than a page of the context cache where a token is a letter."""
TOKENS = 20
"""Of a canary's completion: a block, and some of the one after it."""
SHOWN = 40
"""Characters of a prompt in a message."""


def self_check(pair: "TwoTower", tokenizer: "Tokenizer", checkpoint: str) -> str:
    """A line about what was checked. Leaves nothing behind: neither in an engine nor in the memory of a GPU.

    Raises KernelError, CheckpointError (also where canary.json is broken or of another checkpoint), StorageError.
    """
    import torch

    from model.canary import check_finite
    from model.kernels.check import check_kernels

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
    if torch.cuda.is_available():  # the memory plan counts what is free
        gc.collect()
        torch.cuda.empty_cache()
    return f"self-check passed in {time.monotonic() - started:.1f} s: kernels are right, {compared}"


def make_canary(
    checkpoint: str,
    *,
    prompts: Sequence[str] = (),
    tokens: int = TOKENS,
    dtype: str = "float32",
    gpus: int = 0,
    out: str | None = None,
    force: bool = False,
) -> list[str]:
    """Writes the canary.json of a checkpoint that is known to be well, or to `out` -> a line a prompt and one at last.

    Raises CheckpointError, also where the file is there and `force` is not given; RequestError, KernelError and
    StorageError.
    """
    import torch

    from model import load_model
    from model.canary import SETTINGS, make_cases, measure_rounding
    from model.kernels.check import check_kernels

    opened = open_checkpoint(checkpoint)
    url = canary_url(checkpoint) if out is None else os.path.abspath(out) if is_local(out) else out
    if not force:
        require_free(url)
    towers: Towers = "both" if any(name.startswith("denoiser_tower.") for name in opened.tensors) else "context"
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    pair = load_model(checkpoint, dtype=dtype, devices=devices, towers=towers)
    if pair.tokenizer is None:
        raise CheckpointError(f"checkpoint {safe_url(checkpoint)} has no tokenizer.json: prompts cannot be read")
    check_kernels(pair)
    texts = tuple(prompts) or PROMPTS
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise RequestError("a prompt holds characters that are not Unicode text (lone surrogate)") from None
    encoded = pair.tokenizer.encode_batch(texts)
    if empty := [text for text, ids in zip(texts, encoded, strict=True) if not ids]:
        raise RequestError(f"prompt {empty[0]!r} has no tokens; leave it out")
    cases, decode = make_cases(pair, encoded, tokens), pair.tokenizer.decode
    rounding = None
    if dtype == "float32":
        del pair  # both may be too much for the memory
        rounded = load_model(checkpoint, dtype="bfloat16", devices=devices, towers=towers)
        rounding = {mode: round(off, 5) for mode, off in measure_rounding(rounded, cases).items()}
    name = torch.cuda.get_device_name(0) if gpus else "cpu"
    canary = CanaryFile(
        format=1,
        checkpoint=opened.identity(),
        dtype=dtype,  # type: ignore[arg-type]  # load_model has refused any other
        device=name,
        torch=torch.__version__,
        settings=dict(SETTINGS),
        rounding=rounding,
        prompts=tuple(CanaryPrompt(text=text, ids=tuple(ids)) for text, ids in zip(texts, encoded, strict=True)),
        cases=tuple(_record(case, encoded.index(list(case.prompt_ids))) for case in cases),
    )
    write_canary(url, canary, force=force)
    lines = [f"{texts[case.prompt][:SHOWN]!r} {case.mode}: {decode(case.token_ids)!r}" for case in canary.cases]
    return [*lines, f"wrote {safe_url(url)}: {len(texts)} prompts, {len(cases)} completions in {dtype} on {name}"]


def _check_canary(pair: "TwoTower", tokenizer: "Tokenizer", checkpoint: str, canary: CanaryFile) -> None:
    from model.canary import SETTINGS, check_cases

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


def _record(case: "Case", prompt: int) -> CanaryCase:
    fields = asdict(case)
    del fields["prompt_ids"]
    return CanaryCase(prompt=prompt, **fields)


def _case(canary: CanaryFile, case: CanaryCase) -> "Case":
    from model.canary import Case

    fields = case.model_dump(exclude={"prompt"})
    return Case(prompt_ids=canary.prompts[case.prompt].ids, **fields)
