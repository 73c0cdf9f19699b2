"""Simulates a calibration without a model: a bench whose speeds and texts follow a formula, over a small real input."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from model.errors import TwoTowerError
from model.requests import Completion
from pipeline.calibration.bench import Replica, RowLimit, Run, Speed, Task, Tick
from pipeline.calibration.options import Options
from pipeline.calibration.points import AR, Setting
from pipeline.calibration.sample import SampleRow
from pipeline.calibration.setup import Setup, prepare
from pipeline.config.loader import load_job
from tests.pipeline.cases import write

JOB = """\
# a comment
name: small
input:
  path: {folder}/in
  id_column: key
output: {{path: "${{CASE_OUT:-{folder}}}/out", rows_per_file: 100}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation:
  confidence_threshold: 0.9
  max_new_tokens: 64
engine: {{max_rows: 16}}
workers: {{gpus: 0, replicas: 2}}
"""
SMALL: dict[str, Any] = {"sample": 24, "thresholds": (0.8, 0.9), "steps": (4, 16), "rows": (1, "auto")}
MAX_ROWS = 32


def job_file(folder: Path, rows: int = 60, text: str = JOB, prompts: Sequence[str | None] | None = None) -> Path:
    """Write a job file, and its input of prompts of about 8 to 200 letters. Return the path of the job file."""
    rng = random.Random(1)
    made = prompts or [f"{i} " + "word " * rng.randrange(1, 40) for i in range(rows)]
    write(folder / "in/a.parquet", prompt=made, key=[f"k{i}" for i in range(len(made))])
    file = folder / "small.yaml"
    file.write_text(text.format(folder=folder))
    return file


def setup_of(file: Path, overrides: Sequence[str] = (), **options: Any) -> Setup:
    return prepare(load_job(file, overrides), Options(**{**SMALL, **options}))


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeBench:
    """A bench without a model: AR repeats the prompt, and diffusion repeats it with a wrong word in some of the rows.

    The less careful the setting of diffusion, the more rows have a wrong word. speedup: how much faster diffusion at
    threshold 0.8 with 16 steps is than AR. dies_at: the name of the point at which the replica dies. full: the names of
    the points for which memory is too small.
    """

    def __init__(
        self,
        clock: FakeClock | None = None,
        speedup: float = 2.4,
        seconds: float = 10.0,
        dies_at: str = "",
        full: tuple[str, ...] = (),
        device: str = "fake device",
        before: Callable[[Task], None] = lambda _: None,
    ) -> None:
        self.clock, self.speedup, self.seconds = clock or FakeClock(), speedup, seconds
        self.dies_at, self.full, self.device, self.before = dies_at, full, device, before
        self.rows: Sequence[SampleRow] = ()
        self.measured: list[Task] = []
        self.closed = False

    def __call__(self, _job: Any) -> "FakeBench":
        return self

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        self.rows = rows
        tick(0, 0)
        fitting = tuple((limit, MAX_ROWS if limit == "auto" else limit) for limit in limits if limit != 9999)
        refused = tuple((limit, "no memory") for limit in limits if limit == 9999)
        return Replica(self.device, fitting, refused, (("twotower", "1"), ("torch", "2")))

    def measure(self, task: Task, tick: Tick) -> Run:
        self.before(task)
        tick(0, len(self.rows))
        if task.point.name == self.dies_at:
            raise TwoTowerError("the replica died: killed")
        if task.point.name in self.full:
            return Run(None)
        self.measured.append(task)
        self.clock.now += self.seconds
        tick(len(self.rows), len(self.rows))
        setting = task.point.setting
        rate = 100 * task.point.max_rows**0.7 * _factor(setting, self.speedup)
        speed = Speed(rate, 0.01, 3.0, round(3 * rate), 20, self.seconds)
        completions = tuple(complete(row, setting) for row in self.rows) if task.whole else ()
        sampled = task.whole and any(row.params.temperature > 0 for row in self.rows)
        hot = tuple(replace(done, text=f"{done.text}!", token_ids=(*done.token_ids, 33)) for done in completions)
        return Run(speed, hot if sampled else completions, completions if sampled else ())

    def close(self) -> None:
        self.closed = True


def _factor(setting: Setting, speedup: float) -> float:
    if setting.threshold is None or setting.steps is None:
        return 1.0
    return float(speedup * (1.8 - setting.threshold) * (16 / setting.steps) ** 0.1)


def complete(row: SampleRow, setting: Setting) -> Completion:
    text = row.prompt
    if setting.threshold is not None and setting.steps is not None:
        chance = 3 * (1 - setting.threshold) * (0.5 + 2 / setting.steps)
        text = text.replace("word", "lamp", 1) if crc32(row.key.encode()) % 100 / 100 < chance else text
    ids = tuple(text.encode())
    blocks = -(-len(ids) // 16)
    steps = () if setting == AR else (4,) * blocks
    return Completion(
        key=row.key,
        token_ids=ids,
        text=text,
        finish_reason="stop",
        prompt_tokens=len(row.prompt_ids),
        denoiser_forwards=sum(steps),
        steps_per_block=steps,
    )
