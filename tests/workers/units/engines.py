"""Provides fake engines that kill or hang their process, or break, at marked rows, and that log the rows they
finish."""

import os
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import workers.replica.replica
from model.requests import Completion, EngineError
from tests.waiting import PATIENCE_S
from tests.workers.fakes import FakeEngine, FakeMaker
from tests.workers.jobs import SmallJob
from workers.replica.build import ReplicaSpec
from workers.units.runner import UnitRunner

KILL, HANG, BREAK, LOSE_GPU = "KILL", "HANG", "BREAK", "LOSE GPU"
"""Prompts that mark rows. KILL: the process ends without a message. HANG: only the first replica stands still. BREAK:
the engine is broken from then on. LOSE_GPU: only the first process loses its GPU."""


class MarkedEngine(FakeEngine):
    """An engine that does at a marked row what the mark says. It logs the key of every row that it finishes, with one
    file per process."""

    def __init__(self, log: Path, replica: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.log, self.replica = log, replica
        self.broken = False

    def step(self) -> list[Completion]:
        done = super().step()
        prompts = [bytes(request.prompt_ids).decode() for request, _ in self.slots.values()]
        for prompt in (*prompts, *((completion.text or "")[::-1] for completion in done)):
            match prompt:
                case "KILL":
                    os._exit(3)
                case "HANG" if self.replica == "r0":
                    (self.log.parent / "hangs").touch()
                    time.sleep(3600)
                case "BREAK":
                    self.broken = True
                case "LOSE GPU" if not (gpu := self.log.parent / "gpu lost").exists():
                    gpu.touch()
                    lost = tuple(self.slots)
                    self.slots.clear()
                    raise_lost_gpu(lost, tuple(done))
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        with (self.log / str(os.getpid())).open("a") as file:
            file.write("".join(f"{completion.key}\n" for completion in done))
        return done


def raise_lost_gpu(keys: tuple[str, ...], done: tuple[Completion, ...]) -> None:
    """Raise what the loop raises for an exception in a kernel. It does not use torch, which is slow to import."""
    cause = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered\nadvice over several\nlines")
    text = f"denoise of {len(keys)} rows failed: {type(cause).__name__}: {cause}"
    raise EngineError(text, keys, done) from cause


class MarkedMaker(FakeMaker):
    """Makes runners with marked engines. The log is the folder `finished` beside the output.

    flushed: each step waits until the runner's flushes are written, so that a kill loses no more rows than the flush
    settings say, however slow the disk is. leave_s: seconds that a replica's process has for each part of its leaving,
    in place of FLUSH_S and LEAVE_S; only for replicas in processes of their own.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        *arguments: Any,
        flushed: bool = False,
        leave_s: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(spec, *arguments, **settings)
        self.flushed, self.leave_s = flushed, leave_s
        self.log = Path(spec.job.output.path).parent / "finished"
        self.log.mkdir(exist_ok=True)

    def __call__(self, replica: str) -> UnitRunner:
        if self.leave_s is not None:
            workers.replica.replica.FLUSH_S = workers.replica.replica.LEAVE_S = self.leave_s
        runner = super().__call__(replica)
        if self.flushed:
            wait_for_flushes(runner)
        return runner

    def make_engine(self, replica: str) -> FakeEngine:
        """See FakeMaker."""
        return MarkedEngine(self.log, replica, max_rows=self.max_rows, **self.pace(replica))


def wait_for_flushes(runner: UnitRunner) -> None:
    """Make each later step of the runner's fake engine wait until the runner's flushes are written."""
    engine = runner._engine
    assert isinstance(engine, FakeEngine)

    def wait_for_them() -> None:
        flushes = [opened.flush for opened in list(runner._open.values()) if opened.flush]
        assert not wait(flushes, PATIENCE_S).not_done

    engine.before_step = wait_for_them


def finished_rows(folder: Path) -> list[str]:
    """Return the keys of the rows that engines have finished. A row that was done twice is there twice."""
    return [key for file in (folder / "finished").iterdir() for key in file.read_text().split("\n")[:-1]]


def segment_rows(small: SmallJob) -> list[str]:
    """Return the keys of the rows that are in segments."""
    files = Path(small.job.output.path).glob("_job/segments/*/*.parquet")
    return [f"{row['source_file']}#{row['source_row']}" for file in files for row in pq.read_table(file).to_pylist()]
