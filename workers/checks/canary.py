"""Makes canary.json, a file of expected completions, from a checkpoint that is known to be right, and compares a model
that was loaded later with this file."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from model.checkpoint.config import Towers
from model.checkpoint.reader import open_checkpoint
from pipeline.checks.canary_file import (
    CanaryCase,
    CanaryFile,
    CanaryPrompt,
    canary_url,
    remedy,
    require_free,
    write_canary,
)
from pipeline.core.errors import CheckpointError, RequestError
from pipeline.storage.urls import credentials_flaw, is_local, safe_url

if TYPE_CHECKING:
    from model import TwoTower
    from model.checkpoint.tokenizer import Tokenizer
    from model.checks.canary import Case

PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 4, ",
    '{"name": "Ada", "born": ',
    "A lighthouse is a tower that guides ships at night. Its lamp turns once in ten seconds and is seen from far away.",
)
"""The default prompts. Every tokenizer yields tokens for them, and the last one is longer than a page of the context
cache even if each letter is a token."""

SHOWN = 40
"""The largest number of characters of a prompt that messages show."""


def make_canary(
    checkpoint: str, *, prompts: Sequence[str], tokens: int, dtype: str, gpus: int, out: str | None, force: bool
) -> list[str]:
    """Write canary.json for a checkpoint that is known to be right, and return lines of text that describe it.

    If `prompts` is empty, PROMPTS are used. A completion has at most `tokens` tokens. The model runs in `dtype` on the
    first `gpus` GPUs, or on the CPU if that is 0. The file is written beside the weights, or to `out`. There is a line
    for each completion, and a summary at the end. Raises CheckpointError (also
    if the file exists and `force` is false), RequestError, KernelError and StorageError.
    """
    import torch

    from model import load_model
    from model.checks.canary import SETTINGS, make_cases, measure_rounding
    from model.checks.kernels import check_kernels

    for path in (checkpoint, out or ""):
        if why := credentials_flaw(path):
            raise CheckpointError(f"cannot use {safe_url(path)}: {why}")
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
        del pair  # the memory may be too small for both models
        rounded = load_model(checkpoint, dtype="bfloat16", devices=devices, towers=towers)
        rounding = {mode: round(off, 5) for mode, off in measure_rounding(rounded, cases).items()}
    name = torch.cuda.get_device_name(0) if gpus else "cpu"
    canary = CanaryFile(
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


def _record(case: "Case", prompt: int) -> CanaryCase:
    """Return a case as canary.json stores it. `prompt`: the position of its prompt in the file."""
    fields = asdict(case)
    del fields["prompt_ids"]
    return CanaryCase(prompt=prompt, **fields)


def check_canary(pair: "TwoTower", tokenizer: "Tokenizer", checkpoint: str, canary: CanaryFile) -> None:
    """Raise CheckpointError, with what to do, if a loaded model or its tokenizer does not agree with the canary: it has
    another vocabulary or other prompt tokens, or computes other completions or scores."""
    from model.checks.canary import SETTINGS, Case, check_cases

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
    cases = [
        Case(prompt_ids=canary.prompts[case.prompt].ids, **case.model_dump(exclude={"prompt"})) for case in canary.cases
    ]
    try:
        check_cases(pair, cases, canary.dtype, canary.rounding)
    except (CheckpointError, RequestError) as error:
        raise CheckpointError(
            f"checkpoint {safe_url(checkpoint)} is not what {where} expects: {error}; {_diagnosis(checkpoint, canary)}"
        ) from error


def _diagnosis(checkpoint: str, canary: CanaryFile) -> str:
    """Return what to do, which depends on whether the checkpoint's files are those that the canary was made from."""
    identity = open_checkpoint(checkpoint).identity()
    if identity == canary.checkpoint:
        return (
            "its files look like those that canary.json was made from: copy the weights again (of large shards only "
            "samples are compared), try another node, or look at what has changed in this version"
        )
    return (
        f"canary.json was made from other files (identity {canary.checkpoint[:12]}, here {identity[:12]}): copy the "
        f"weights again if they should be the same, else {remedy(checkpoint)}"
    )
