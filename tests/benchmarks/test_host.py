"""Tests that the benchmark of the host's work runs on this engine, and that its rows work as it claims."""

import pytest

from model import load_model
from model.engine.engine import AR_TOKENS
from model.requests import Mode
from tests.benchmarks import host

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "most"), [("diffusion", 16 / 5), ("ar", AR_TOKENS)])
def test_a_turn_is_measured_part_by_part(monkeypatch: pytest.MonkeyPatch, mode: Mode, most: float) -> None:
    """A block of 16 tokens takes about 5 steps and one extension, which bounds the tokens that 4 rows get in a turn."""
    monkeypatch.setattr(host, "WARM_UP", 20)
    turn = host.measure(load_model("builtin:noise"), mode, 4, turns=100)
    assert set(turn.parts) == set(host.PARTS)
    launches = {"extend", "denoise"} if mode == "diffusion" else {"extend"}
    assert all(turn.parts[part] > 0 for part in {"collect", "loop", "begin", "plans", "device", *launches})
    assert turn.critical > 0
    assert turn.total == pytest.approx(sum(turn.parts.values()) - turn.parts["device"])
    assert 4 * most / 3 < turn.tokens < 4 * most * 1.2
