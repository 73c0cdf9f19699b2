"""Measures the points of a calibration on a replica. The weights stay loaded; each change of the row limit makes a new
engine."""

import gc
import platform
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from model.errors import RequestError
from model.requests import Completion, Request
from pipeline.calibration.bench import Replica, RowLimit, Run, Task, Tick
from pipeline.calibration.points import Setting
from pipeline.calibration.sample import SampleRow
from pipeline.checks.machine import installed_version
from pipeline.config.job import Job
from pipeline.core.text import counted
from workers.checks.self_check import self_check
from workers.replica import throughput
from workers.replica.build import load_pair, make_engine
from workers.units.prefix import best_prefix, has_prefix

if TYPE_CHECKING:
    from model import Engine, TwoTower


class ReplicaBench:
    """A pipeline.calibration.bench.Bench whose model and engine are in this process."""

    def __init__(self, job: Job) -> None:
        """Create a bench; this loads nothing yet. The settings of `job` must be such that both towers are loaded."""
        self._job = job
        self._pair: TwoTower | None = None
        self._engine: Engine | None = None
        self._rows: Sequence[SampleRow] = ()
        self._prefixes: Sequence[int] = ()  # for each row, how many of its tokens are the common prefix

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """See Bench. Raises CheckpointError, KernelError, RequestError and JobError."""
        from model.memory.planner import plan_memory

        tick(0, len(rows))
        self._pair, tokenizer = load_pair(self._job)
        self_check(self._pair, tokenizer, self._job.model.checkpoint)
        tick(0, len(rows))
        self._rows = rows
        prompts = [array("i", row.prompt_ids) for row in rows]
        prefix = best_prefix(prompts)
        self._prefixes = [len(prefix) if has_prefix(prompt, prefix) else 0 for prompt in prompts]
        fitting: list[tuple[RowLimit, int]] = []
        refused: list[tuple[RowLimit, str]] = []
        for limit in limits:
            try:
                fitting.append((limit, plan_memory(self._pair, self._limited(limit).engine.limits()).max_rows))
            except RequestError as error:
                refused.append((limit, str(error)))
        return Replica(_device(self._job.workers.gpus), tuple(fitting), tuple(refused), _versions())

    def measure(self, task: Task, tick: Tick) -> Run:
        """See Bench. Raises EngineError, RequestError and JobError."""
        engine = self._engine_of(task.point.max_rows)
        requests = self._requests(task.point.setting)
        greedy: tuple[Completion, ...] = ()
        if task.whole and any(request.params.temperature > 0 for request in requests):
            cold = [replace(request, params=replace(request.params, temperature=0.0)) for request in requests]
            greedy = throughput.run_once(engine, cold, tick)
        tokens = partial(_tokens_in_slots, engine)
        run = throughput.measure(engine, requests, tokens, whole=task.whole, window_s=task.window_s, tick=tick)
        return replace(run, greedy=greedy)

    def close(self) -> None:
        """See Bench."""
        self._drop_engine()
        self._pair = None

    def _limited(self, limit: RowLimit) -> Job:
        """Return the job with this engine.max_rows."""
        return self._job.model_copy(update={"engine": self._job.engine.model_copy(update={"max_rows": limit})})

    def _engine_of(self, max_rows: int) -> "Engine":
        """Return the engine with this row limit: the present one, or a new one that replaces it."""
        if self._engine is None or self._engine.limits.max_rows != max_rows:
            assert self._pair is not None, "not started"
            self._drop_engine()  # before the new engine is made: both together would not fit into memory
            self._engine = make_engine(self._pair, self._limited(max_rows))
        return self._engine

    def _drop_engine(self) -> None:
        if self._engine is not None:
            import torch

            self._engine = None
            gc.collect()
            with suppress(RuntimeError):  # raised if the GPU was lost; that error is reported elsewhere
                torch.cuda.empty_cache()

    def _requests(self, setting: Setting) -> list[Request]:
        """Return a request for each row of the sample, with the setting to measure instead of the job's. A row with a
        threshold of its own keeps it."""
        requests = []
        for row, prefix_tokens in zip(self._rows, self._prefixes, strict=True):
            params = replace(row.params, mode=setting.mode)
            if setting.steps is not None:
                params = replace(params, steps_per_block=setting.steps)
            if setting.threshold is not None and not row.keeps_threshold:
                params = replace(params, confidence_threshold=setting.threshold)
            requests.append(Request(row.key, row.prompt_ids, params, prefix_tokens))
        return requests


def _tokens_in_slots(engine: "Engine") -> int:
    """Return the number of completion tokens that the rows in slots have so far."""
    return sum(len(row.tokens) for row in engine.scheduler.running.values())


def _device(gpus: int) -> str:
    """Return the devices of a replica with this number of GPUs as text (Replica.device)."""
    import torch

    if gpus:
        names = [torch.cuda.get_device_name(index) for index in range(gpus)]
        return f"{gpus} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)
    return f"CPU ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


def _versions() -> tuple[tuple[str, str], ...]:
    """Return (name, version) of twotower, torch and Python."""
    import torch

    ours = installed_version("twotower") or "unknown"  # not installed if it is run from its folder, as on Ray
    return ("twotower", ours), ("torch", torch.__version__), ("python", platform.python_version())
