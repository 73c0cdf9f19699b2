"""Tests the slow reference against every golden case; other tests compare the engine with this reference."""

from typing import Any

import pytest
import torch

from model.requests import GenerationParams
from tests.model.golden_cases import CHECKPOINT, cases, relative_error, tensor
from tests.model.reference import Reference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.set_num_threads(1)
    return Reference(str(CHECKPOINT))


@pytest.fixture(scope="module")
def exact() -> Reference:
    return Reference(str(CHECKPOINT), dtype=torch.float64)


def by_id(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases(kind), ids=lambda case: case["id"])


@by_id("ar_logits")
def test_context_logits(reference: Reference, case: dict[str, Any]) -> None:
    got = reference.context_logits(case["prompt_ids"])
    assert relative_error(got, tensor(case["expected"]["logits"])) <= case["tolerance"]


@by_id("denoise_logits")
def test_denoiser_logits(reference: Reference, case: dict[str, Any]) -> None:
    got = reference.denoiser_logits(case["prompt_ids"], case["block"], case["t"])
    assert relative_error(got, tensor(case["expected"]["logits"])) <= case["tolerance"]


@by_id("mock_ar_logits")
def test_mock_ar_logits(reference: Reference, case: dict[str, Any]) -> None:
    got = reference.mock_ar_logits(case["prompt_ids"])
    assert relative_error(got, tensor(case["expected"]["logits"])) <= case["tolerance"]


@pytest.mark.parametrize("case", cases("context_state") + cases("extend_state"), ids=lambda case: case["id"])
def test_context_state(reference: Reference, case: dict[str, Any]) -> None:
    ids = case["prompt_ids"] + [token for block in case.get("blocks", []) for token in block]
    states = reference.context_state(ids)
    for layer, names in case["expected"]["layers"].items():
        state = states[int(layer)]
        assert state.keys() == names.keys()
        for part, name in names.items():
            assert relative_error(state[part], tensor(name)) <= case["tolerance"], name
    if "last_logits" in case["expected"]:
        got = reference.context_logits(ids)[-1]
        assert relative_error(got, tensor(case["expected"]["last_logits"])) <= case["tolerance"]


def test_float64_agrees_with_the_goldens_to_their_noise_floor(exact: Reference) -> None:
    case = cases("ar_logits")[-1]
    got = exact.context_logits(case["prompt_ids"])
    assert got.dtype == torch.float64
    assert relative_error(got, tensor(case["expected"]["logits"])) <= 2 * case["float64_relative_error"]


def eos(case: dict[str, Any]) -> tuple[int, ...]:
    return () if case["eos_token_id"] is None else (case["eos_token_id"],)


@by_id("generate_mask_diffusion")
def test_diffusion(reference: Reference, case: dict[str, Any]) -> None:
    params = GenerationParams(
        max_new_tokens=case["max_new_tokens"],
        block_size=case["block_size"],
        steps_per_block=case["steps_per_block"],
        confidence_threshold=case["confidence_threshold"],
        eos_ids=eos(case),
    )
    result = reference.generate(case["prompt_ids"], params)
    expected = case["expected"]
    assert list(result.token_ids) == expected["new_ids"]
    assert result.forwards == expected["nfe"]
    assert list(result.steps_per_block) == expected["nfe_per_block"]
    assert [list(block) for block in result.trace] == tensor(expected["xt"]).tolist()


@by_id("generate_ar")
def test_ar(reference: Reference, case: dict[str, Any]) -> None:
    params = GenerationParams(mode="ar", max_new_tokens=case["max_new_tokens"], eos_ids=eos(case))
    result = reference.generate(case["prompt_ids"], params)
    assert list(result.token_ids) == case["expected"]["new_ids"]
    assert result.forwards == 0


@by_id("generate_mock_ar")
def test_mock_ar(reference: Reference, case: dict[str, Any]) -> None:
    params = GenerationParams(mode="mock_ar", max_new_tokens=case["max_new_tokens"], eos_ids=eos(case))
    result = reference.generate(case["prompt_ids"], params)
    assert list(result.token_ids) == case["expected"]["new_ids"]
    assert result.forwards == len(result.token_ids)


def test_a_prompt_of_one_token_and_a_short_last_block(reference: Reference) -> None:
    whole = reference.generate([7], GenerationParams(max_new_tokens=32, block_size=16))
    cut = reference.generate([7], GenerationParams(max_new_tokens=20, block_size=16))
    assert cut.token_ids == whole.token_ids[:20]
    assert (cut.forwards, cut.steps_per_block) == (whole.forwards, whole.steps_per_block)
    for mode in ("ar", "mock_ar"):
        result = reference.generate([7], GenerationParams(mode=mode, max_new_tokens=5))
        assert len(result.token_ids) == 5


def test_the_block_that_holds_an_eos_is_kept_whole(reference: Reference) -> None:
    free = reference.generate([7, 8], GenerationParams(max_new_tokens=48))
    eos_id = free.token_ids[20]
    stopped = reference.generate([7, 8], GenerationParams(max_new_tokens=48, eos_ids=(eos_id, 255)))
    blocks = 1 if eos_id in free.token_ids[:16] else 2
    assert stopped.token_ids == free.token_ids[: 16 * blocks]


def test_a_sampler_chooses_and_its_choice_makes_the_confidence(reference: Reference) -> None:
    asked = []

    def second(logits: torch.Tensor, block: int, step: int, position: int) -> int:
        asked.append((block, step, position))
        assert logits.shape == (256,)
        return int(logits.topk(2).indices[1])

    params = GenerationParams(
        max_new_tokens=8, block_size=4, steps_per_block=4, confidence_threshold=0.0, temperature=1.0
    )
    result = reference.generate([7, 8, 9], params, second)
    assert result.steps_per_block == (1, 1)
    assert asked == [(block, 0, position) for block in (0, 1) for position in range(4)]
    assert result.token_ids != reference.generate([7, 8, 9], GenerationParams(max_new_tokens=8, block_size=4)).token_ids


@pytest.mark.parametrize("params", [GenerationParams(temperature=0.5), GenerationParams(stop=("x",))])
def test_what_it_does_not_do_is_refused(reference: Reference, params: GenerationParams) -> None:
    with pytest.raises(ValueError, match="stop strings"):
        reference.generate([7], params)


def test_ar_mode_needs_the_context_tower_alone() -> None:
    both, context = Reference("builtin:noise"), Reference("builtin:noise", towers="context")
    assert len(context.weights) < len(both.weights)
    assert context.context_logits([5, 6]).equal(both.context_logits([5, 6]))
