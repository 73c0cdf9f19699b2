"""Tests of rows that are loops: they are generated again, more carefully, the best try is kept, and a row ends with its
last try."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from model.requests import Completion, EngineError, GenerationParams, Request
from pipeline.core.repetition import DEGENERATE
from pipeline.core.types import Assignment
from tests.waiting import PATIENCE_S
from tests.workers.fakes import FakeEngine
from tests.workers.jobs import open_job
from tests.workers.units.resume_cases import EACH_ROW, NEVER
from tests.workers.units.retrying import run_units, runner_of
from workers.units.runner import QUEUE_FACTOR
from workers.units.tries import judge, next_params

PARAMS = GenerationParams(confidence_threshold=0.8, eos_ids=(0,))
LADDER = [("diffusion", 0.8), ("diffusion", 0.9), ("ar", 0.8)]
TOKENS = {"L": (7,) * 60, "l": (*range(1, 41), *[7] * 40), "t": (*range(1, 41), 0), "e": ()}
"""The tokens that a try gives, by letter: a loop, half a loop, text that ends, an error."""
SHARES = {"L": 1.0, "l": 0.5, "t": 0.0, "e": None}
SCRIPTS = ["".join(script) for script in product("Llte", repeat=3)]


class ScriptedEngine(FakeEngine):
    """An engine that reads in each letter of a prompt what one try of its row gives."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.requests: dict[str, Request] = {}
        self.tried = Counter[tuple[str, str]]()

    def submit(self, request: Request) -> None:
        self.requests[request.key] = request
        super().submit(request)

    def step(self) -> list[Completion]:
        try:
            return [self._scripted(completion) for completion in super().step()]
        except EngineError as error:
            done = tuple(self._scripted(completion) for completion in error.completions)
            raise EngineError(str(error), error.keys, done) from None

    def _scripted(self, completion: Completion) -> Completion:
        request = self.requests[completion.key]
        number = LADDER.index((request.params.mode, request.params.confidence_threshold))
        letter = bytes(request.prompt_ids).decode()[number]
        self.tried[completion.key, request.params.mode] += 1
        return Completion(
            key=completion.key,
            token_ids=TOKENS[letter],
            text=f"{letter}{number}",
            finish_reason="error" if letter == "e" else "length",
            error="not finite" if letter == "e" else None,
            denoiser_forwards=10 + number,
            queue_s=1.0,
            prefill_s=0.25,
            denoise_s=0.5,
            commit_s=0.125,
            latency_s=2.0,
        )


def kept(script: str) -> tuple[int, int]:
    """Return the number of the try that is kept, and how many tries there are: until one is good, but only one if the
    first is an error."""
    tries = 1
    while tries < 3 and script[0] != "e" and script[tries - 1] != "t":
        tries += 1
    order = "tlLe"  # best first
    return min(range(tries), key=lambda number: (order.index(script[number]), number)), tries


@pytest.mark.parametrize(
    ("settings", "ladder"),
    [
        ({}, LADDER),
        ({"confidence_threshold": 0}, [("diffusion", 0), ("diffusion", 0.5), ("ar", 0)]),
        ({"confidence_threshold": 1}, [("diffusion", 1), ("ar", 1)]),
        ({"steps_per_block": 1}, [("diffusion", 0.8), ("ar", 0.8)]),
        ({"block_size": 1}, [("diffusion", 0.8), ("ar", 0.8)]),
        ({"mode": "mock_ar"}, [("mock_ar", 0.8), ("ar", 0.8)]),
        ({"mode": "ar"}, [("ar", 0.8)]),
    ],
)
def test_the_tries_of_a_row_that_always_loops(settings: dict[str, Any], ladder: list[tuple[str, float]]) -> None:
    first = replace(PARAMS, seed=5, max_new_tokens=70, **settings)
    tries, params = [], first
    while True:
        tries.append(judge(params, Completion(key="k", token_ids=TOKENS["L"], finish_reason="length")))
        following = next_params(tries)
        if following is None:
            break
        params = following
        assert replace(params, mode=first.mode, confidence_threshold=first.confidence_threshold) == first
    assert [(one.params.mode, one.params.confidence_threshold) for one in tries] == ladder


def test_the_best_try_is_kept_with_the_seconds_of_all(tmp_path: Path) -> None:
    small = open_job(tmp_path, SCRIPTS, rows_per_file=100)
    rows = run_units(small, runner_of(small, ScriptedEngine(), PARAMS), attempt=2)
    assert len(rows) == len(SCRIPTS)
    for row, script in zip(rows, SCRIPTS, strict=True):
        number, tries = kept(script)
        letter = script[number]
        assert row["completion"] == f"{letter}{number}"
        assert (row["mode"], row["attempt"]) == (LADDER[number][0], 2 + tries - 1)
        assert (row["repetition"], row["completion_tokens"]) == (SHARES[letter], len(TOKENS[letter]))
        assert (row["finish_reason"] == "error") == (letter == "e") == (row["error"] is not None)
        assert row["denoiser_forwards"] == 10 + number
        seconds = [row[name] for name in ("queue_s", "prefill_s", "denoise_s", "commit_s", "latency_s")]
        assert seconds == [tries * one for one in (1.0, 0.25, 0.5, 0.125, 2.0)]


def test_by_default_the_loop_is_flagged_and_kept(tmp_path: Path) -> None:
    small = open_job(tmp_path, ["Ltt", "ltt", "ttt", "ett", None])
    engine = ScriptedEngine()
    rows = run_units(small, runner_of(small, engine, PARAMS, retry=False))
    assert [row["repetition"] for row in rows] == [1.0, 0.5, 0.0, None, None]
    assert {row["attempt"] for row in rows} == {1}
    assert sum(engine.tried.values()) == 4
    (unit,) = small.plan.units
    assert small.ledger.finished(small.plan)[unit.id].totals.degenerate == 2


def test_a_next_try_does_not_wait_behind_the_queue(tmp_path: Path) -> None:
    """It takes the place that its row leaves in the engine, so the engine's queue stays as short as before."""
    small = open_job(tmp_path, ["LLt"] * 60, rows_per_file=60)
    engine = ScriptedEngine(max_rows=4)
    assert {row["completion"] for row in run_units(small, runner_of(small, engine, PARAMS))} == {"t2"}
    assert engine.most_waiting <= QUEUE_FACTOR * 4 + 4
    order = list(engine.order)
    assert len(order) == 180
    last = {key: place for place, key in enumerate(order)}
    assert max(last[key] - order.index(key) for key in last) < 100, "a row that begins is soon done"


class Killed(Exception):  # noqa: N818
    """Stands for the death of the process."""


class MortalEngine(ScriptedEngine):
    """An engine that dies in its step `dies_at`."""

    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self.dies_at = dies_at

    def step(self) -> list[Completion]:
        if self.steps == self.dies_at:
            raise Killed
        return super().step()


COLUMNS = ("id", "completion", "mode", "repetition", "completion_tokens", "denoiser_forwards", "latency_s")


@pytest.mark.parametrize("dies_at", [35, 60, 100])
def test_killed_between_tries_a_row_begins_with_its_first(tmp_path: Path, dies_at: int) -> None:
    """A row is finished when its last try is, so that a resume gives the same rows as a run without faults."""
    whole = open_job(tmp_path / "whole", SCRIPTS, rows_per_file=100)
    expected = run_units(whole, runner_of(whole, ScriptedEngine(), PARAMS))
    small = open_job(tmp_path / "killed", SCRIPTS, rows_per_file=100, **EACH_ROW)
    runner = runner_of(small, MortalEngine(dies_at), PARAMS)
    runner.add(Assignment(small.plan.units[0], 1))
    assert runner.work(PATIENCE_S) == []  # it has read the unit
    assert runner.work(PATIENCE_S) == []  # it has generated its first row
    with pytest.raises(Killed):
        runner.work(PATIENCE_S)
    under_way = {key for key, (_, row) in runner._in_engine.items() if row.tries}
    assert under_way, "some row should have been in its second try"
    runner.stop(PATIENCE_S)
    runner.close()
    saved = {
        f"{row['source_file']}#{row['source_row']}"
        for file in Path(small.job.output.path).glob("_job/segments/*/*.parquet")
        for row in pq.read_table(file).to_pylist()
    }
    assert saved
    assert not saved & under_way
    rows = run_units(small, runner_of(small, ScriptedEngine(), PARAMS))
    assert [[row[name] for name in COLUMNS] for row in rows] == [[row[name] for name in COLUMNS] for row in expected]


def test_a_forward_that_fails_costs_the_try_alone(tmp_path: Path) -> None:
    """The row continues with the try it was in. Failures in two different tries are not two failures of the same
    row."""
    small = open_job(tmp_path, ["LLt"] * 12, rows_per_file=12, **NEVER)
    engine = ScriptedEngine(max_rows=12, fail_at={2, 9, 17})
    rows = run_units(small, runner_of(small, engine, PARAMS))
    assert [(row["completion"], row["attempt"], row["latency_s"]) for row in rows] == [("t2", 3, 6.0)] * 12
    assert set(engine.tried.values()) <= {1, 2}
    for row in rows:
        assert (engine.tried[row["id"], "diffusion"], engine.tried[row["id"], "ar"]) == (2, 1)


def test_what_counts_as_degenerate() -> None:
    done = Completion(key="k", token_ids=(*range(1, 97), *[7] * 32), finish_reason="stop")
    assert judge(PARAMS, done).repetition == DEGENERATE == 0.25
    assert not judge(PARAMS, done).good
    assert judge(PARAMS, replace(done, token_ids=(0, *done.token_ids))).good
    empty, broken = replace(done, token_ids=()), replace(done, token_ids=(), finish_reason="error")
    assert (judge(PARAMS, empty).repetition, judge(PARAMS, broken).repetition) == (0.0, None)
    halfway = judge(PARAMS, replace(done, finish_reason="error"))
    assert (halfway.repetition, halfway.good) == (DEGENERATE, False)
