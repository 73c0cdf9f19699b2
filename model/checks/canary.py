"""Checks with a canary (prompts whose completions are known) that a loaded model computes what it should.

    cases = make_cases(pair, prompts, tokens)     # from a model that is known to be right
    check_cases(pair, cases, made_in="float32")   # on a model that has just been loaded: raises CheckpointError

Two things are compared: the generated tokens, if both sides compute in float32; and, in any dtype, a score of each
expected token, with all tokens before it as expected. In bfloat16 two almost equal logits can change places, and from
there on the completions differ; scores do not have this problem. AGREE says how well scores must agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from model.engine.engine import Engine
from model.errors import CheckpointError
from model.network.two_tower import TwoTower
from model.requests import Completion, EngineLimits, GenerationParams, Request

CanaryMode = Literal["ar", "diffusion"]
BLOCK = 16  # tokens; the block size of diffusion cases
SETTINGS: Mapping[str, float] = {"block_size": BLOCK, "steps_per_block": 16, "confidence_threshold": 0.9}
"""The settings of diffusion cases: the defaults of the released code."""
MAX_ROWS = 32  # limit of the cases that are generated at the same time

AGREE: Mapping[str, tuple[float, float]] = {"float32": (0.9, 1e-3), "bfloat16": (0.25, 0.05)}
"""The agreement that is required, by dtype, as (share, difference): in each mode, at least this share of the tokens
must have a score that is at most this far from the expected one, in standard deviations (see Case.scores).

The dtype is the coarser one of the checked model and of the model that made the cases. In float32 only the order of
sums differs between machines, and scores differ far less than the limit. The limits for bfloat16 come from the hardest
case, builtin:noise. Its random routers send a token to other experts at the slightest rounding. A token that goes to
other experts may be far off, but the closest quarter of the tokens stays well within the limit. If the values of one
matrix are shuffled, even the closest quarter exceeds it, except that a shuffled projection of the attention, which
builtin:noise hardly uses, is noticed only in some cases. In float32 every shuffled tensor is noticed, vectors too.
"""
ROUNDING_SHARE, ROUNDING_FACTOR = 0.75, 4.0
"""The stricter limit for trained models, which are far less sensitive to rounding than builtin:noise.

A canary made in float32 also records, for each mode, the difference of scores that ROUNDING_SHARE of the tokens stay
below if the same model runs in bfloat16. In a bfloat16 replica, the same share of the tokens must stay below
ROUNDING_FACTOR times that.
"""
SHAKE, SHAKES = 1e-4, 3
"""The relative noise on the embeddings, and the number of random draws of it that leave `stable` tokens unchanged.

The noise is at least 10 times what another order of sums changes. So no stable token can become another one on another
machine because two logits are almost equal.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt with its completion, generated greedily in one mode."""

    mode: CanaryMode
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    fed: tuple[tuple[tuple[int, ...], ...], ...]
    """The blocks that were fed to the denoiser, grouped by block of the completion; empty in AR mode."""
    stable: int
    """The number of first tokens that are the same on every machine in float32; 0 if the case is not from float32."""
    scores: tuple[float, ...]
    """The score of each token when it was committed: the standard score of its logit among all logits of its position.

    Unlike a probability, it does not saturate and does not depend on the size of the vocabulary.
    """


def make_cases(pair: TwoTower, prompts: Sequence[Sequence[int]], tokens: int) -> list[Case]:
    """Generate at most `tokens` tokens per prompt and mode with a model that is assumed to be right; return the cases.

    Every prompt comes in AR mode first, then every prompt in diffusion mode, if the denoiser is loaded.

    Raises RequestError if a prompt does not fit the model's context, and CheckpointError if logits are not finite.
    """
    keys = [(mode, tuple(prompt)) for mode in modes(pair) for prompt in prompts]
    requests = [_request(str(i), mode, prompt, tokens) for i, (mode, prompt) in enumerate(keys)]
    completions = _generate(pair, requests)
    float32 = pair.dtype == torch.float32
    stable = [len(done.token_ids) if float32 else 0 for done in completions]
    for draw in range(SHAKES if float32 else 0):
        with _shaken(pair, seed=draw):
            shaken = _generate(pair, requests)
        agreed = [_agree(one.token_ids, other.token_ids) for one, other in zip(completions, shaken, strict=True)]
        stable = [min(both) for both in zip(stable, agreed, strict=True)]
    cases = []
    for (mode, prompt), done, count in zip(keys, completions, stable, strict=True):
        ends = accumulate(done.steps_per_block)
        fed = tuple(done.trace[end - steps : end] for steps, end in zip(done.steps_per_block, ends, strict=True))
        case = Case(mode=mode, prompt_ids=prompt, token_ids=done.token_ids, fed=fed, stable=count, scores=())
        cases.append(replace(case, scores=tuple(round(score, 5) for score in _scores(pair, case).tolist())))
    return cases


def measure_rounding(pair: TwoTower, cases: Sequence[Case]) -> dict[str, float]:
    """Return, by mode, the difference of scores that ROUNDING_SHARE of the tokens stay below in this bfloat16 model.

    `cases` were made by the same model in float32.
    """
    found = {mode: [case for case in cases if case.mode == mode] for mode in modes(pair)}
    return {mode: float(differences(pair, mine).quantile(ROUNDING_SHARE)) for mode, mine in found.items()}


def check_cases(
    pair: TwoTower, cases: Sequence[Case], made_in: str, rounding: Mapping[str, float] | None = None
) -> None:
    """Raise CheckpointError, with the mode and the difference, if the model does not compute what the cases expect.

    Cases of a mode whose towers are not loaded are left out. made_in: the dtype in which the cases were made. rounding:
    the result of measure_rounding for these cases, or None if it was not measured.
    """
    dtypes = {made_in, str(pair.dtype).removeprefix("torch.")}
    limits = [AGREE["bfloat16" if "bfloat16" in dtypes else "float32"]]
    cases = [case for case in cases if case.mode in modes(pair)]
    for mode in dict.fromkeys(case.mode for case in cases):
        off = differences(pair, [case for case in cases if case.mode == mode])
        if not off.isfinite().all():
            raise CheckpointError(f"in {mode} mode logits are not finite")
        noted = [(ROUNDING_SHARE, ROUNDING_FACTOR * rounding[mode])] if rounding and len(dtypes) > 1 else []
        for share, allowed in (*limits, *noted):
            if (right := float((off <= allowed).float().mean())) < share:
                raise CheckpointError(
                    f"in {mode} mode only {right:.0%} of the expected tokens' logits are right, at least {share:.0%} "
                    f"must be; half are off by {off.median():.2g} standard deviations or more, "
                    f"{allowed:.2g} is allowed"
                )
    if dtypes == {"float32"}:
        _check_tokens(pair, cases)


def _check_tokens(pair: TwoTower, cases: Sequence[Case]) -> None:
    """Raise CheckpointError if a generated completion differs from its case before `case.stable` tokens."""
    requests = [
        _request(str(i), case.mode, case.prompt_ids, len(case.token_ids)) for i, case in enumerate(cases) if case.stable
    ]
    for done in _generate(pair, requests):
        case = cases[int(done.key)]
        if (same := _agree(done.token_ids, case.token_ids)) < case.stable:
            raise CheckpointError(
                f"in {case.mode} mode token {same} of a completion is {done.token_ids[same]}, "
                f"but must be {case.token_ids[same]}"
            )


def check_finite(pair: TwoTower, prompts: Sequence[Sequence[int]]) -> None:
    """Raise CheckpointError if logits are not finite in the first forwards after these prompts, in all modes.

    AR mode generates two tokens; diffusion mode generates one block in a single step and the first token of the next.
    Prompts that leave too little room in the context are left out.
    """
    tokens = {"ar": 2, "diffusion": BLOCK + 1}
    room = pair.config.max_position_embeddings - (BLOCK + 1)
    keys = [(mode, prompt) for mode in modes(pair) for prompt in prompts if len(prompt) <= room]
    _generate(pair, [_request(str(i), mode, prompt, tokens[mode], 0.0) for i, (mode, prompt) in enumerate(keys)])


def modes(pair: TwoTower) -> tuple[CanaryMode, ...]:
    """Return the modes that the loaded towers can run."""
    return ("ar",) if pair.denoiser is None else ("ar", "diffusion")


def differences(pair: TwoTower, cases: Sequence[Case]) -> Tensor:
    """Return how far each score is from the expected one, as an absolute value: (tokens of all cases,) float32.

    `cases` must not be empty, and their modes must be loaded.
    """
    return torch.cat([(_scores(pair, case) - torch.tensor(case.scores)).abs() for case in cases])


def _request(key: str, mode: CanaryMode, prompt: Sequence[int], tokens: int, threshold: float | None = None) -> Request:
    """Return a greedy request that generates `tokens` tokens with SETTINGS.

    `threshold`, if given, replaces their confidence threshold. No token id ends the row early.
    """
    settings = dict(SETTINGS) if threshold is None else {**SETTINGS, "confidence_threshold": threshold}
    # no EOS: a completion that ends at once would test little
    return Request(key, prompt, GenerationParams(mode=mode, max_new_tokens=tokens, **settings))  # type: ignore[arg-type]


def _generate(pair: TwoTower, requests: Sequence[Request]) -> list[Completion]:
    """Return the completions, in the order of the requests, from a new engine with traces.

    So nothing of the checks stays in the engine that generates the rows of a job. Raises CheckpointError if a
    completion has an error.
    """
    if not requests:
        return []
    needed = max(len(request.prompt_ids) + request.params.max_new_tokens for request in requests)
    context = min(max(needed, 2 * BLOCK), pair.config.max_position_embeddings)
    limits = EngineLimits(max_rows=min(len(requests), MAX_ROWS), max_context_tokens=context)
    completions = Engine(pair, limits, trace=True).generate(requests)
    for done in completions:
        if done.error is not None:
            raise CheckpointError(done.error)
    return completions


@torch.inference_mode()
def _scores(pair: TwoTower, case: Case) -> Tensor:
    """Return the scores of the case's tokens in this model, (len(token_ids),) float32 on the CPU; see Case.scores."""
    prompt, ids = list(case.prompt_ids), list(case.token_ids)
    cache = pair.new_cache(slots=1, kv_tokens=len(prompt) + len(ids))
    slot = cache.allocator.acquire(len(prompt) + len(ids))
    assert slot is not None

    def extend(tokens: list[int]) -> Tensor:
        return pair.extend(cache, cache.rows([slot], [len(tokens)]), torch.tensor(tokens))

    if case.mode == "ar":
        return _standard_scores(pair.context.logits(extend(prompt + ids[:-1])[-len(ids) :]), ids)
    assert pair.denoiser is not None
    extend(prompt)
    found = []
    for number, steps in enumerate(case.fed):
        block = ids[number * BLOCK : (number + 1) * BLOCK]
        fed = torch.tensor(steps)  # (steps, BLOCK): all steps run in one forward, as rows with the same context
        masked = fed == pair.config.mask_token_id
        rows = cache.rows([slot] * len(steps), [BLOCK] * len(steps))
        hidden = pair.denoise(cache, rows, fed.flatten(), masked.float().mean(1))
        place = torch.arange(len(block))
        committed = masked.long().cumsum(0).argmax(0)[place]  # the last step in which the position was masked
        hidden = hidden[(committed * BLOCK + place).to(hidden.device)]
        found.append(_standard_scores(pair.denoiser.logits(hidden), block))
        extend(block)
    return torch.cat(found)


def _standard_scores(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the standard score of one id's logit at each position: logits (N, V) -> (N,)."""
    mine = logits[torch.arange(len(ids)), list(ids)]
    return ((mine - logits.mean(-1)) / logits.std(-1)).cpu()


def _agree(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens before the first one that differs, or the shorter length if none does."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextmanager
def _shaken(pair: TwoTower, seed: int) -> Iterator[None]:
    """Put a little noise on the columns of the model's embeddings while the context is open."""
    weights = [tower.embeddings.weight.data for tower in (pair.context, pair.denoiser) if tower is not None]
    before = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    try:
        for weight in weights:
            weight.mul_(1 + SHAKE * torch.randn(weight.shape[1], generator=generator).to(weight.device))
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
