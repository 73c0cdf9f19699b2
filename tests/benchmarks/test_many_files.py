"""Tests that all steps of the benchmark of many files run on a small corpus, and that verify accepts its output."""

from pathlib import Path

import pytest

from tests.benchmarks import many_files

pytestmark = pytest.mark.slow


def test_all_steps_run_on_a_small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_files, "FILES_A_FOLDER", 4)
    corpus = many_files.Corpus(str(tmp_path), files=9, rows=3)
    said = {name: step(corpus) for name, step in many_files.STEPS.items()}
    assert said["list"] == "9 files"
    assert said["plan"].startswith("27 rows, ")
    assert said["write parts"].startswith("27 rows in ")
    assert said["status"].startswith("complete, 27 rows in ")
    assert said["verify"].startswith("verified: 27 rows in ")
    assert len({file.read_bytes() for file in tmp_path.glob("in/*/*.parquet")}) == 9
