"""Tests of the sample of a calibration: it represents all rows, is the same every time, and reads little of the
input."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from model.requests import GenerationParams
from pipeline.calibration import sample as sampling
from pipeline.calibration.sample import Sample, draw_sample
from pipeline.config.job import Job
from pipeline.core.errors import InputError
from tests.pipeline.cases import make_job, not_utf8, plan_of, write
from tests.workers.fakes import FakeEncoder

PARAMS = GenerationParams(max_new_tokens=50)


def draw(job: Job, size: int = 64, seed: int = 0, room: int = 10_000) -> Sample:
    return draw_sample(job, plan_of(job), FakeEncoder(), PARAMS, room, size, seed)


def job_over(folder: Path, prompts: Any, group: int | None = None, **sections: Any) -> Job:
    write(folder / "in/a.parquet", group=group, prompt=prompts)
    return make_job(folder / "in", folder / "out", **sections)


def lengths(count: int) -> list[int]:
    """Return the lengths of prompts: most are short, and one in fifty is long."""
    rng = random.Random(4)
    return [rng.randrange(900, 1000) if i % 50 == 0 else rng.randrange(5, 40) for i in range(count)]


def test_of_a_small_input_all_rows_are_taken(tmp_path: Path) -> None:
    drawn = draw(job_over(tmp_path, [f"prompt {i}" for i in range(10)]))
    assert sorted(row.key for row in drawn.rows) == sorted(f"a.parquet#{i}" for i in range(10))
    assert sum(drawn.weights) == pytest.approx(1)
    assert {row.id for row in drawn.rows} == {row.key for row in drawn.rows}
    assert (drawn.read, drawn.bad) == (10, 0)


def test_long_prompts_are_there_in_their_true_share(tmp_path: Path) -> None:
    made = lengths(3000)
    drawn = draw(job_over(tmp_path, ["x" * length for length in made]))
    assert len(drawn.rows) == 64
    assert sum(drawn.weights) == pytest.approx(1)
    assert max(drawn.weights) < 1.2 * min(drawn.weights)
    assert [stratum.rows for stratum in drawn.strata] == [8] * 8
    assert [stratum.share for stratum in drawn.strata] == pytest.approx([1 / 8] * 8, abs=0.002)
    bounds = [(stratum.shortest, stratum.longest) for stratum in drawn.strata]
    assert bounds == sorted(bounds)
    assert bounds[-1][1] > 900
    estimate = sum(len(row.prompt_ids) * row.weight for row in drawn.rows)
    assert estimate == pytest.approx(sum(made) / len(made), rel=0.5)


def test_the_same_seed_draws_the_same_rows(tmp_path: Path) -> None:
    job = job_over(tmp_path, ["x" * length for length in lengths(3000)])
    assert draw(job) == draw(job)
    assert draw(job).rows != draw(job, seed=1).rows


def test_of_many_rows_few_are_read_from_many_places(tmp_path: Path) -> None:
    for number in range(4):
        prompts = [f"file {number} row {i}" for i in range(20_000)]
        write(tmp_path / f"in/{number}.parquet", group=1000, prompt=prompts)
    drawn = draw(make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 500}))
    assert sampling.ROWS_READ * 0.9 < drawn.read <= sampling.ROWS_READ
    assert drawn.places == sampling.PLACES
    assert {row.key[0] for row in drawn.rows} == {"0", "1", "2", "3"}
    assert drawn.shifted == 0


def test_rows_deep_in_a_large_row_group_are_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "REACH_BYTES", 10_000)
    drawn = draw(job_over(tmp_path, [f"{i:099}" for i in range(20_000)]))
    assert drawn.shifted > 20
    assert max(int(row.key.rpartition("#")[2]) for row in drawn.rows) < 2000


def test_reading_ends_when_the_prompts_are_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "READ_CHARS", 10_000)
    drawn = draw(job_over(tmp_path, ["x" * 100] * 20_000))
    assert drawn.read < 200


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    prompts = not_utf8(b"good", None, b"", b"\xff", b"   ", b"x" * 60)
    drawn = draw(job_over(tmp_path, prompts), room=100)
    assert [row.prompt for row in drawn.rows] == ["good"]
    assert (drawn.read, drawn.bad) == (6, 5)
    assert drawn.good_share == pytest.approx(1 / 6)
    assert ("prompt is null", 1) in drawn.reasons


def test_an_input_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 2 rows read can be generated: 1 x prompt is null; 1 x prompt is"):
        draw(job_over(tmp_path, pa.array([None, ""], pa.string())))


def test_settings_of_a_row_are_its_own(tmp_path: Path) -> None:
    """A row keeps its own threshold at every point, and never gets more tokens than the calibration allows."""
    columns: dict[str, Any] = {"prompt": ["a", "b", "c"], "n": [10, None, 900], "g": [None, 0.5, None]}
    write(tmp_path / "in/a.parquet", **columns)
    settings = {"row_settings": {"max_new_tokens": "n", "confidence_threshold": "g"}}
    rows = {row.prompt: row for row in draw(make_job(tmp_path / "in", tmp_path / "out", input=settings)).rows}
    assert [rows[name].params.max_new_tokens for name in "abc"] == [10, 50, 50]
    assert [rows[name].keeps_threshold for name in "abc"] == [False, True, False]
    assert rows["b"].params.confidence_threshold == 0.5
