"""Tests the lockstep baseline: one row gets what the released code gives, and rows of a batch wait for the slowest."""

from typing import Any

import pytest
import torch

from model.engine.engine import Engine
from model.network.two_tower import TwoTower, load_model
from model.requests import EngineLimits, GenerationParams, Request
from tests.benchmarks.lockstep import generate, serve
from tests.benchmarks.workload import requests
from tests.model.golden_cases import CHECKPOINT, cases, tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair() -> TwoTower:
    torch.set_num_threads(1)
    return load_model(str(CHECKPOINT))


@pytest.mark.parametrize("case", cases("generate_mask_diffusion"), ids=lambda case: case["id"])
def test_one_row_is_the_released_code(pair: TwoTower, case: dict[str, Any]) -> None:
    """A batch of one row gives the tokens, the forwards and their inputs of the golden case."""
    params = GenerationParams(
        max_new_tokens=case["max_new_tokens"],
        block_size=case["block_size"],
        steps_per_block=case["steps_per_block"],
        confidence_threshold=case["confidence_threshold"],
        eos_ids=() if case["eos_token_id"] is None else (case["eos_token_id"],),
    )
    batch = generate(pair, [case["prompt_ids"]], [params])
    assert batch.tokens == [case["expected"]["new_ids"]]
    assert batch.steps_per_block == case["expected"]["nfe_per_block"]
    assert torch.cat(batch.trace).tolist() == tensor(case["expected"]["xt"]).tolist()


def test_twins_get_what_one_row_gets_alone(pair: TwoTower) -> None:
    """Two equal rows in a batch get the tokens of one row alone, and `serve` returns results in the requests' order."""
    params = GenerationParams(max_new_tokens=32, confidence_threshold=0.8)
    alone = generate(pair, [[7, 8, 9, 10]], [params])
    twins = generate(pair, [[7, 8, 9, 10]] * 2, [params] * 2)
    assert twins.tokens == alone.tokens * 2
    assert twins.steps_per_block == alone.steps_per_block
    mixed = [Request(str(n), [7, 8, 9, 10][:n], params) for n in (1, 4, 2, 3)]
    assert serve(pair, mixed, 1)[1] == alone.tokens[0]


def test_a_batch_takes_the_steps_of_its_slowest_row(pair: TwoTower) -> None:
    """Every forward computes all rows until no row has a mask left, even if some rows are done earlier."""
    prompts = [[11 * i + j for j in range(8)] for i in range(1, 7)]
    batch = generate(pair, prompts, [GenerationParams(max_new_tokens=32, confidence_threshold=0.8)] * 6)
    mask_id = pair.config.mask_token_id
    assert all(blocks.shape == (6, 16) for blocks in batch.trace)
    assert len(batch.trace) == sum(batch.steps_per_block)
    masked = [(blocks == mask_id).any(1) for blocks in batch.trace]
    assert all(rows.any() for rows in masked)
    assert any(not rows.all() for rows in masked)
    assert all(len(tokens) == 32 and mask_id not in tokens for tokens in batch.tokens)


@pytest.mark.parametrize(("lengths", "message"), [((16, 32), "has one"), ((20, 20), "multiple")])
def test_what_the_released_code_does_not_do_is_refused(pair: TwoTower, lengths: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pair, [[5], [6]], [GenerationParams(max_new_tokens=n) for n in lengths])


def test_the_engine_generates_what_the_baseline_does_a_row_at_a_time(pair: TwoTower) -> None:
    """The engine gives the same tokens as the baseline with one row at a time, so both sides do the same work."""
    work = requests(6, prompt_tokens=20, max_new_tokens=32, vocabulary=pair.config.vocab_size)
    completions = Engine(pair, EngineLimits(max_rows=3, max_context_tokens=64)).generate(work)
    assert [list(completion.token_ids) for completion in completions] == serve(pair, work, 1)
