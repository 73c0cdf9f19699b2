"""Plays each scenario of the chaos suite that needs neither Ray nor a server, once and short."""

from pathlib import Path

import pytest

from tests.chaos.scenarios.catalogue import SCENARIOS, Scenario
from tests.chaos.scenarios.trial import Place

pytestmark = pytest.mark.slow

LOCAL = [scenario for scenario in SCENARIOS if scenario.short and not (scenario.ray or scenario.s3)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", LOCAL, ids=lambda scenario: scenario.name)
def test_the_fault_costs_no_row_and_breaks_no_promise(scenario: Scenario, tmp_path: Path) -> None:
    """The docstring of the scenario's function says what the fault is and what is promised (seed 0)."""
    record = scenario.run(Place(tmp_path / "trial", seed=0))
    assert record.good, record
