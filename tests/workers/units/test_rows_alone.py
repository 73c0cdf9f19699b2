"""Tests that rows of the real engine are what they would be alone, with settings of their own and in each of their
tries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model import Engine, EngineLimits, GenerationParams, Request, load_model
from model.network.two_tower import TwoTower
from model.requests import Completion
from pipeline.core.repetition import repetition
from pipeline.prompts.encoder import PromptEncoder
from tests.workers.jobs import SmallJob, open_job
from tests.workers.units.retrying import run_units, runner_of
from workers.units import tries

pytestmark = pytest.mark.slow


def encoder_of(pair: TwoTower, small: SmallJob) -> PromptEncoder:
    assert pair.tokenizer is not None
    return PromptEncoder(pair.tokenizer, small.plan.prompts)


@pytest.fixture(scope="module")
def pair() -> TwoTower:
    torch.set_num_threads(1)  # small operations never stall on one thread
    return load_model("builtin:noise", dtype="float32", devices=["cpu"])


@pytest.fixture(scope="module")
def lone(pair: TwoTower) -> Engine:
    """Make an engine with room for one row."""
    return Engine(pair, EngineLimits(max_rows=1, max_context_tokens=128))


def alone(engine: Engine, key: str, prompt: str, params: GenerationParams) -> Completion:
    tokenizer = engine.pair.tokenizer
    assert tokenizer is not None
    return engine.generate([Request(key, tokenizer.encode_batch([prompt])[0], params)])[0]


def test_the_engine_gives_each_try_as_if_it_were_the_only_one(
    tmp_path: Path, pair: TwoTower, lone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try has the row's own key and may be in any batch. Its tokens are those of a job with the mode and threshold
    of the try."""
    prompts = [f"prompt {'x' * (7 * i % 40)} {i}" for i in range(6)]
    small = open_job(tmp_path, prompts, rows_per_file=6)
    params = GenerationParams(max_new_tokens=18, confidence_threshold=0.2, temperature=0.9, seed=4)
    careful, ar = replace(params, confidence_threshold=0.6), replace(params, mode="ar")
    expected, loops = [], set()
    for i, prompt in enumerate(prompts):
        done = [alone(lone, f"a.parquet#{i}", prompt, one) for one in (params, careful, ar)]
        loops |= {one.token_ids for one in done[: i % 3]}
        number = next((n for n, one in enumerate(done) if one.token_ids not in loops), 0)
        expected.append((done[number].text, ("diffusion", "diffusion", "ar")[number], 1 + number))
    assert {attempt for _, _, attempt in expected} == {1, 2, 3}
    monkeypatch.setattr(tries, "repetition", lambda ids, _eos: 1.0 if ids in loops else repetition(ids))
    engine = Engine(pair, EngineLimits(max_rows=4, max_context_tokens=128))
    rows = run_units(small, runner_of(small, engine, params, encoder_of(pair, small)))
    assert [(row["completion"], row["mode"], row["attempt"]) for row in rows] == expected
    engine.check()


def test_rows_with_settings_of_their_own_are_generated_as_if_alone(
    tmp_path: Path, pair: TwoTower, lone: Engine
) -> None:
    columns: dict[str, Any] = {
        "prompt": [f"prompt {i}" for i in range(8)],
        "n": pa.array([5, 30, None, 17, 100, -1, 2, 127], pa.int32()),
        "t": pa.array([None, 0.0, 1.0, 0.7, None, 0.5, 2.0, None], pa.float64()),
        "c": pa.array([0.0, 1.0, None, 0.5, 0.1, None, None, None], pa.float64()),
        "seed": pa.array([1, None, 3, 3, None, 4, 5, None], pa.uint8()),
        "stop": pa.array([None, [], ["e", "zz"], None, ["a"], None, ["q"], None], pa.list_(pa.string())),
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in/a.parquet")
    names = {"max_new_tokens": "n", "temperature": "t", "confidence_threshold": "c", "seed": "seed", "stop": "stop"}
    small = open_job(tmp_path, None, input={"path": str(tmp_path / "in"), "row_settings": names})
    params = GenerationParams(max_new_tokens=40, confidence_threshold=0.3, temperature=0.8, stop=("~",))
    engine = Engine(pair, EngineLimits(max_rows=8, max_context_tokens=128))
    rows = run_units(small, runner_of(small, engine, params, encoder_of(pair, small)))
    cells = pa.table(columns).to_pylist()
    for i, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        if i in (5, 7):
            continue
        own: dict[str, Any] = {name: cell[column] for name, column in names.items() if cell[column] is not None}
        expected = alone(lone, f"a.parquet#{i}", cell["prompt"], replace(params, **own))
        found = (row["completion"], row["finish_reason"], row["completion_tokens"], row["mean_confidence"])
        assert found == (
            expected.text,
            expected.finish_reason,
            len(expected.token_ids),
            expected.mean_confidence,
        )
    assert len({row["completion_tokens"] for row in rows}) > 4
    assert rows[5]["error"] == "column 'n': max_new_tokens is -1: it must be a whole number of at least 1"
    assert rows[7]["error"] == (
        "request 'a.parquet#7': 8 prompt tokens and max_new_tokens 127 exceed the context of 128 tokens; "
        "shorten the prompt or lower max_new_tokens (max_new_tokens is that of column 'n')"
    )
