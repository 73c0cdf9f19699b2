"""Tests canaries: a sound model agrees with its own canary in either dtype, and a damaged one does not."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.checks import canary
from model.checks.canary import Case, check_cases, check_finite, make_cases, measure_rounding
from model.errors import CheckpointError, RequestError
from model.network.two_tower import TwoTower, load_model
from tests.model.reference import Reference

pytestmark = pytest.mark.slow

TEXTS = ("The capital of France is", "1, 2, 3, 4, ")


def model(dtype: str = "float32", **arguments: object) -> TwoTower:
    return load_model("builtin:noise", dtype, **arguments)  # type: ignore[arg-type]


def prompts(pair: TwoTower) -> Sequence[Sequence[int]]:
    assert pair.tokenizer is not None
    return pair.tokenizer.encode_batch(TEXTS)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    pair = model()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    made = make_cases(pair, prompts(pair), 20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.state_dict().items())
    return made


def test_cases_are_in_both_modes_and_mostly_stable(cases: list[Case]) -> None:
    assert [(case.mode, len(case.token_ids)) for case in cases] == [("ar", 20)] * 2 + [("diffusion", 20)] * 2
    assert sum(case.stable for case in cases) >= 60
    assert [len(case.fed) for case in cases] == [0, 0, 2, 2]


def test_scores_are_those_of_the_reference(cases: list[Case]) -> None:
    """The scores agree with the reference: in AR mode for each token, in diffusion mode for the tokens that the first
    step of a block committed."""
    reference, mask = Reference("builtin:noise"), model().config.mask_token_id

    def score(logits: Tensor, token: int) -> float:
        return float((logits[token] - logits.mean()) / logits.std())

    ar, diffusion = cases[0], cases[2]
    logits = reference.context_logits([*ar.prompt_ids, *ar.token_ids[:-1]])[-20:]
    right = [score(row, token) for row, token in zip(logits, ar.token_ids, strict=True)]
    assert ar.scores == pytest.approx(right, abs=1e-4)
    logits = reference.denoiser_logits(diffusion.prompt_ids, [mask] * 16, 1.0)
    first = [place for place in range(16) if diffusion.fed[0][1][place] != mask]
    assert first
    right = [score(logits[place], diffusion.token_ids[place]) for place in first]
    assert [diffusion.scores[place] for place in first] == pytest.approx(right, abs=1e-4)


def test_a_model_that_is_well_passes(cases: list[Case]) -> None:
    """A sound model passes in three stages, in another dtype, and with only its context tower loaded."""
    check_cases(model(devices=["cpu"] * 3), cases, "float32")
    for arguments in ({}, {"towers": "context"}):
        check_cases(model("bfloat16", **arguments), cases, "float32")


def test_a_canary_made_in_bfloat16_passes_in_either_dtype() -> None:
    pair = model("bfloat16")
    made = make_cases(pair, prompts(pair)[:1], 20)
    assert not any(case.stable for case in made)
    check_cases(pair, made, "bfloat16")
    check_cases(model(), made, "bfloat16")


def shuffle(tensor: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor.copy_(tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape))


def shuffled(name: str) -> Callable[[TwoTower], None]:
    return lambda pair: shuffle(dict(pair.named_parameters())[name].data)


def exchange_towers(pair: TwoTower) -> None:
    assert pair.denoiser is not None
    state = {name: tensor.clone() for name, tensor in pair.context.state_dict().items()}
    pair.context.load_state_dict(pair.denoiser.state_dict())
    pair.denoiser.load_state_dict(state)


def exchange_layers(pair: TwoTower) -> None:
    """Exchange two layers of one kind, as if two shards with the same tensor names had been stored under each other's
    name."""
    first, second = pair.context.layers[0], pair.context.layers[2]
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.load_state_dict(second.state_dict())
    second.load_state_dict(state)


LARGE = ["context.embeddings.weight", "context.layers.6.mixer.up", "denoiser.layers.5.mixer.in_proj.weight"]
LARGE += ["denoiser.head.weight", "times.0.block.weight", "tables.0"]
SMALL = ["context.layers.8.mixer.q_proj.weight", "context.layers.5.mixer.D", "denoiser.layers.8.mixer.k_proj.weight"]
WRONG = [(name, shuffled(name)) for name in LARGE]
WRONG += [("towers exchanged", exchange_towers), ("layers exchanged", exchange_layers)]


@pytest.mark.parametrize(("name", "harm"), WRONG)
def test_wrong_weights_fail_in_either_dtype(cases: list[Case], name: str, harm: Callable[[TwoTower], None]) -> None:
    del name
    for dtype in ("float32", "bfloat16"):
        pair = model(dtype)
        harm(pair)
        with pytest.raises(
            CheckpointError, match=r"^in (ar|diffusion) mode only \d+% of the expected tokens' logits are"
        ):
            check_cases(pair, cases, "float32")


@pytest.mark.parametrize("name", SMALL)
def test_small_harm_fails_in_float32(cases: list[Case], name: str) -> None:
    """Damage that is smaller than the rounding to bfloat16 still shows in float32."""
    pair = model()
    shuffled(name)(pair)
    with pytest.raises(CheckpointError):
        check_cases(pair, cases, "float32")


def test_what_rounding_changes_is_noted_and_tightens_the_check(cases: list[Case]) -> None:
    """If bfloat16 changes a model only a little, the check in bfloat16 finds damage that would pass as rounding in
    another model."""
    pair = model("bfloat16")
    rounding = measure_rounding(pair, cases)
    assert all(0 < off < 2 for off in rounding.values())
    check_cases(pair, cases, "float32", rounding)
    with pytest.raises(
        CheckpointError, match=r"^in ar mode only \d+% of the expected tokens' logits are right, at least 75% must be"
    ):
        check_cases(pair, cases, "float32", {"ar": rounding["ar"] / 20, "diffusion": rounding["diffusion"]})


def test_harm_to_the_denoiser_is_none_of_an_ar_jobs_business(cases: list[Case]) -> None:
    one, other = cases[0], replace(cases[2], scores=(99.0,) * 20)
    check_cases(model(towers="context"), [one, other], "float32")


def test_tokens_are_compared_one_by_one_as_far_as_they_are_stable(cases: list[Case]) -> None:
    """If the scores agree but the engine makes other tokens from the logits, the check finds the first token that
    differs among the stable ones."""
    pair, case = model(), cases[2]
    other = (*case.token_ids[:5], (case.token_ids[5] + 1) % 256, *case.token_ids[6:])
    few = replace(case, token_ids=other)
    few = replace(few, scores=tuple(canary._scores(pair, few).tolist()))
    text = f"in diffusion mode token 5 of a completion is {case.token_ids[5]}, but must be {other[5]}"
    with pytest.raises(CheckpointError, match=f"^{text}$"):
        check_cases(pair, [few], "float32")
    check_cases(pair, [replace(few, stable=5)], "float32")


def test_logits_that_are_not_finite_are_found_in_either_mode(cases: list[Case]) -> None:
    """Logits that are not finite are found with a canary and without one, even if only the denoiser gives them."""
    for tower in ("context", "denoiser"):
        pair = model()
        getattr(pair, tower).layers[3].mixer.o_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(CheckpointError, match="not finite"):
            check_finite(pair, prompts(pair))
        with pytest.raises(CheckpointError, match=r"^in (ar|diffusion) mode logits are not finite$"):
            check_cases(pair, cases, "float32")
    check_finite(model(), prompts(model()))
    check_finite(model("bfloat16", towers="context"), prompts(model()))


def test_prompts_that_do_not_fit_are_refused_when_a_canary_is_made_and_left_out_of_the_finite_check() -> None:
    pair = model()
    with pytest.raises(RequestError, match="exceed the context of 8192 tokens"):
        make_cases(pair, [[5] * 8190], 20)
    check_finite(pair, [[5] * 8190])
