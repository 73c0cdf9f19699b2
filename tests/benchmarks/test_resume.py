"""Tests that all steps of the resume benchmark run on a small job, and that verify accepts its output."""

from pathlib import Path

import pytest

from tests.benchmarks import resume

pytestmark = pytest.mark.slow


def test_all_steps_run_on_a_small_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "FILES", 4)
    monkeypatch.setattr(resume, "ROWS_A_FILE", 30)
    said = {name: step(str(tmp_path)) for name, step in resume.STEPS.items()}
    assert said["plan"] == "120 rows, 4 units"
    assert said["resume, half done"].startswith("2 of 4 units are done; ")
    assert said["resume, all done"].startswith("4 of 4 units are done; ")
    assert said["verify"].startswith("verified: 120 rows in 4 parts (")
