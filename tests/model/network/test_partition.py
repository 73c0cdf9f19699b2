"""Tests how layers are shared among stages: in contiguous ranges, with states together and weights spread evenly."""

import pytest

from model.checkpoint.config import Towers
from model.checkpoint.released import RELEASED_CONFIG as CONFIG
from model.errors import RequestError
from model.network.partition import partition

EXPERTS = [i for i, kind in enumerate(CONFIG.layer_kinds) if kind == "moe"]


@pytest.mark.parametrize("towers", ["both", "context"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 52])
def test_every_layer_has_one_stage_and_states_lie_together(stages: int, towers: Towers) -> None:
    parts = partition(CONFIG, stages, towers)
    assert len(parts) == stages
    for tower in (0, 1):
        assert [i for part in parts for i in part[tower]] == list(range(CONFIG.num_layers))
        assert all(len(part[tower]) for part in parts)
    for context, denoiser in parts:
        assert {i for i in context if i not in EXPERTS} == {i for i in denoiser if i not in EXPERTS}
        assert towers == "both" or context == denoiser


@pytest.mark.parametrize(("stages", "most"), [(2, 0), (3, 1), (4, 1)])
def test_the_released_model_is_shared_evenly(stages: int, most: int) -> None:
    """The 46 MoE layers of both towers hold nearly all of the weights. Two stages get 23 each; with more stages the
    numbers differ by one at most."""
    counts = [sum(i in EXPERTS for tower in part for i in tower) for part in partition(CONFIG, stages)]
    assert max(counts) - min(counts) <= most
    assert sum(counts) == 46


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(RequestError, match="53 devices for 52 layers"):
        partition(CONFIG, 53)
