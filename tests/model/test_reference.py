"""The slow reference against every golden case: it is what the engine is compared with elsewhere."""

from typing import Any

import pytest
import torch

from model.params import GenerationParams
from model.reference import Reference
from tests.model.golden_cases import CHECKPOINT, cases, relative_error, tensor


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.set_num_threads(1)
    return Reference(str(CHECKPOINT))


@pytest.fixture(scope="module")
def exact() -> Reference:
    return Reference(str(CHECKPOINT), dtype=torch.float64)


def by_id(kind: str) -> Any:
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


@pytest.mark.parametrize(
    "case", cases("context_state") + cases("extend_state"), ids=lambda case: case["id"]
)
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
