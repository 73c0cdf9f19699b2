"""Tests the towers and the engine against the vectors of the reference implementation (golden/README.md)."""

import random
from typing import Any

import pytest
import torch

from model import Completion, Engine, EngineLimits, GenerationParams, Request, TwoTower, load_model
from tests.model import golden_cases as golden

pytestmark = pytest.mark.slow

MODES = {"generate_mask_diffusion": "diffusion", "generate_ar": "ar", "generate_mock_ar": "mock_ar"}
GENERATE = [case for kind in MODES for case in golden.cases(kind)]


DEVICES = [["cpu"], ["cpu"] * 3] + ([["cuda:0"], ["cuda:0"] * 2] if torch.cuda.is_available() else [])


def loaded(devices: list[list[str]]) -> Any:
    """Return a fixture that loads the checkpoint in float32 on each of these lists of devices."""

    @pytest.fixture(scope="module", params=devices, ids=lambda each: f"{len(each)} on {each[0]}")
    def load(request: pytest.FixtureRequest) -> TwoTower:
        return load_model(str(golden.CHECKPOINT), devices=request.param)

    return load


pair = loaded(DEVICES)  # with one stage and with several
one_stage = loaded([devices for devices in DEVICES if len(devices) == 1])


def named(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


def check(case: dict[str, Any], got: torch.Tensor, name: str) -> None:
    assert golden.relative_error(got, golden.tensor(name)) <= case["tolerance"], name


@named(golden.cases("ar_logits"))
def test_context_logits(pair: TwoTower, case: dict[str, Any]) -> None:
    logits = pair.context_logits(case["prompt_ids"])
    assert logits.dtype == torch.float32
    check(case, logits, case["expected"]["logits"])


@named(golden.cases("denoise_logits"))
def test_denoiser_logits(pair: TwoTower, case: dict[str, Any]) -> None:
    check(case, pair.denoiser_logits(case["prompt_ids"], case["block"], case["t"]), case["expected"]["logits"])


@named(golden.cases("mock_ar_logits"))
def test_mock_ar_logits(pair: TwoTower, case: dict[str, Any]) -> None:
    check(case, pair.mock_ar_logits(case["prompt_ids"]), case["expected"]["logits"])


@named(golden.cases("context_state") + golden.cases("extend_state"))
def test_context_cache(pair: TwoTower, case: dict[str, Any]) -> None:
    """The cache is right after a prefill, and after finished blocks are added one by one, with another row beside
    it."""
    pieces = [case["prompt_ids"], *case.get("blocks", [])]
    cache = pair.new_cache(slots=3, kv_tokens=1024)
    other, slot = cache.allocator.acquire(500), cache.allocator.acquire(sum(len(piece) for piece in pieces))
    assert other is not None
    assert slot is not None
    noise = random.Random(case["id"])
    for piece in pieces:
        beside = [noise.randrange(256) for _ in range(noise.randrange(1, 40))]
        hidden = pair.extend(cache, cache.rows([other, slot], [len(beside), len(piece)]), torch.tensor(beside + piece))
    if "last_logits" in case["expected"]:
        check(case, pair.context.logits(hidden[-1:])[0], case["expected"]["last_logits"])
    assert cache.allocator.length(slot) == case["context_length"]
    for layer, names in case["expected"]["layers"].items():
        state: Any = cache.layers[int(layer)]
        for what, name in names.items():
            if what in ("key", "value"):
                pages = state.pages[("key", "value").index(what), list(cache.allocator.table(slot))]
                got = pages.flatten(0, 1)[: cache.allocator.length(slot)].transpose(0, 1)
            else:
                got = {"conv_state": state.conv, "ssm_state": state.ssm}[what][slot]
            check(case, got[None], name)


def request(case: dict[str, Any], key: str | None = None) -> Request:
    mode: Any = MODES[case["kind"]]
    blocks = {k: case[k] for k in ("block_size", "steps_per_block", "confidence_threshold") if k in case}
    eos = () if case["eos_token_id"] is None else (case["eos_token_id"],)
    params = GenerationParams(mode=mode, max_new_tokens=case["max_new_tokens"], eos_ids=eos, **blocks)
    return Request(key or case["id"], case["prompt_ids"], params)


def check_completion(case: dict[str, Any], got: Completion) -> None:
    """Check ids, forwards and traces. At an EOS the engine stops at once: it returns the tokens up to the EOS and runs
    no further forward."""
    expected, eos = case["expected"], case["eos_token_id"]
    ids = expected["new_ids"]
    stopped = eos in ids
    if stopped:
        ids = ids[: ids.index(eos) + 1]
    assert list(got.token_ids) == ids
    assert got.finish_reason == ("stop" if stopped else "length")
    if case["kind"] == "generate_ar":
        assert got.denoiser_forwards == 0
        return
    trace = torch.tensor(got.trace)
    if case["kind"] == "generate_mock_ar":
        assert got.denoiser_forwards == len(ids)
        return
    expected_trace = golden.tensor(expected["xt"]).long()
    assert torch.equal(trace, expected_trace[: len(trace)])
    if stopped:
        assert got.denoiser_forwards <= expected["nfe"]
        assert list(got.steps_per_block[:-1]) == expected["nfe_per_block"][: len(got.steps_per_block) - 1]
    else:
        assert got.denoiser_forwards == expected["nfe"] == len(trace)
        assert list(got.steps_per_block) == expected["nfe_per_block"]


@named(GENERATE)
def test_generate_alone(one_stage: TwoTower, case: dict[str, Any]) -> None:
    engine = Engine(one_stage, EngineLimits(max_rows=1), trace=True)
    check_completion(case, engine.generate([request(case)])[0])
    engine.check()


def batches() -> list[list[dict[str, Any]]]:
    """Return all cases in batches of eight, with mixed modes."""
    cases = random.Random(1).sample(GENERATE, len(GENERATE))
    cases += cases[: -len(cases) % 8]
    return [cases[at : at + 8] for at in range(0, len(cases), 8)]


@pytest.mark.parametrize("cases", batches(), ids=lambda cases: cases[0]["id"])
def test_generate_in_a_batch(pair: TwoTower, cases: list[dict[str, Any]]) -> None:
    """Each case is right in a batch of eight, on one stage and on several."""
    check_batch(pair, cases, max_rows=8)


def test_generate_with_refilled_slots(one_stage: TwoTower) -> None:
    """All cases are right in an engine of five rows, whose slots are used again and again by rows of all modes."""
    check_batch(one_stage, random.Random(0).sample(GENERATE, len(GENERATE)), max_rows=5)


def check_batch(pair: TwoTower, cases: list[dict[str, Any]], max_rows: int) -> None:
    engine = Engine(pair, EngineLimits(max_rows=max_rows, max_prefill_tokens=64), trace=True)
    for member, got in zip(cases, engine.generate([request(member) for member in cases]), strict=True):
        check_completion(member, got)
    engine.check()
    assert engine.active == engine.waiting == 0
