"""Tests of the warning that the blocks of a replica take one forward per token, and of when it is not given."""

from typing import Any

import pytest

from model.requests import Completion, GenerationParams
from pipeline.core.events import ReplicaNote
from pipeline.core.types import Totals, UnitResult
from pipeline.monitoring.efficiency import BLOCKS, ForwardsWatch, slow_replicas
from tests.pipeline.cases import make_job

DEFAULT = GenerationParams()
SLOW = (16, 16)


def completion(steps: tuple[int, ...] = SLOW, tokens: int | None = None) -> Completion:
    count = 16 * len(steps) if tokens is None else tokens
    return Completion(key="k", token_ids=(5,) * count, finish_reason="length", steps_per_block=steps)


def warnings(completions: list[Completion], params: GenerationParams = DEFAULT) -> list[int]:
    """Return the numbers of the completions after which there was a warning, counted from 1."""
    watch = ForwardsWatch()
    return [i for i, done in enumerate(completions, start=1) if watch.take(params, done)]


def test_200_blocks_of_a_forward_a_token_are_told_once() -> None:
    assert warnings([completion()] * 300) == [BLOCKS // 2]
    assert warnings([completion()] * 99) == []


def test_the_text_is_a_warning_for_the_manifest() -> None:
    watch = ForwardsWatch()
    [text] = [text for _ in range(100) if (text := watch.take(DEFAULT, completion()))]
    note = ReplicaNote("r0", text)
    assert note.warning is not None
    assert note.warning.startswith("its first 200 blocks took one denoiser forward per token, so block diffusion")
    assert note.text == f"warning: {note.warning}"
    assert ReplicaNote("r0", "memory ran out").warning is None


@pytest.mark.parametrize("better", [(16, 15), (1,)])
def test_one_block_that_was_faster_settles_it_for_good(better: tuple[int, ...]) -> None:
    assert warnings([*[completion()] * 50, completion(better), *[completion()] * 300]) == []


def test_a_rows_last_block_counts_only_where_it_is_whole() -> None:
    """A last block that is not whole may have ended early, after fewer steps, or after more steps than it has
    tokens."""
    assert warnings([completion((16, 3), tokens=20)] * 200) == [200]
    assert warnings([completion((9,), tokens=4)] * 1000) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"mode": "ar"},
        {"mode": "mock_ar"},
        {"block_size": 1},
        {"confidence_threshold": 1},
        {"confidence_threshold": 1.0},
        {"steps_per_block": 8},
    ],
    ids=str,
)
def test_settings_that_force_or_exclude_it_are_not_watched(setting: dict[str, Any]) -> None:
    """Such rows do not count. If a job also has other rows (through row settings, or another try), only those are
    counted."""
    params = GenerationParams(**setting)
    assert warnings([completion((1,) * 32 if params.block_size == 1 else SLOW)] * 300, params) == []
    watch = ForwardsWatch()
    mixed = [watch.take(each, completion()) for _ in range(100) for each in (params, DEFAULT)]
    assert [text is not None for text in mixed] == [False] * 199 + [True]


def result(unit: str, replica: str, tokens: int, forwards: int) -> UnitResult:
    totals = Totals(rows=1, ok=1, completion_tokens=tokens, denoiser_forwards=forwards, finish_reasons={"length": 1})
    return UnitResult(unit, totals, 1.0, "", replica, 1)


def test_parts_tell_what_a_driver_that_died_had_heard() -> None:
    """All parts of a replica are judged together, if they have enough tokens."""
    job = make_job("/in", "/out")
    results = [
        result("a", "slow", 1600, 1650),
        result("b", "slow", 1600, 1600),
        result("c", "fast", 32_000, 9_000),
        result("d", "short", 3000, 3000),
        result("e", "nearly", 3201, 3200),
    ]
    [warning] = slow_replicas(job, results)
    assert warning.startswith(
        "replica slow: 3,200 tokens took 3,250 denoiser forwards, so block diffusion gains nothing"
    )
    assert slow_replicas(job, results, but={"slow"}) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"generation": {"mode": "ar"}},
        {"generation": {"confidence_threshold": 1.0}},
        {"generation": {"steps_per_block": 4}},
        {"input": {"row_settings": {"confidence_threshold": "careful"}}},
    ],
    ids=str,
)
def test_parts_tell_nothing_where_it_is_no_fault(sections: dict[str, dict[str, Any]]) -> None:
    assert slow_replicas(make_job("/in", "/out", **sections), [result("a", "r", 9000, 9000)]) == []
