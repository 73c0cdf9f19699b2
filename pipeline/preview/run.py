"""Runs a preview: generates the first rows of a job as `run` would, and returns them without writing anything."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model.requests import Completion
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from pipeline.core.text import counted, duration
from pipeline.input.unit_reader import UnitReader
from pipeline.monitoring.progress import Display, Progress
from pipeline.output.begun import OLD_RULES_NOTE, plan_job
from pipeline.planning.checkpoint import check_checkpoint, load_tokenizer
from pipeline.preview.generator import Generator
from pipeline.preview.rows import PreviewRow, choose_rows
from pipeline.prompts.encoder import PromptEncoder
from pipeline.prompts.setup import RULES, PromptSetup
from pipeline.storage.urls import safe_url


@dataclass(frozen=True, slots=True)
class Preview:
    """The rows of a preview with their completions, and what is needed to explain them."""

    job: Job
    prompts: PromptSetup
    """How the prompts were made."""
    control_tokens: tuple[str, ...]
    """The texts of the tokenizer's control tokens."""
    rows: tuple[PreviewRow, ...]
    """The rows in input order, those that cannot be generated included."""
    completions: Mapping[str, Completion]
    """The completion of each row that has a request, by row key; it may be an error."""

    def reason(self, shown: PreviewRow) -> str | None:
        """Return the reason why the row was not generated, or None if it was."""
        completion = self.completions.get(shown.row.key)
        if completion is None:
            return shown.row.error or "the row has no prompt"
        return (completion.error or "unknown error") if completion.finish_reason == "error" else None


def generate_preview(
    job: Job,
    wanted: int,
    make_generator: Callable[[Job], Generator],
    display: Display,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Preview:
    """Plan the job, and generate its first `wanted` rows that can be generated.

    No replica is made if there are none among the rows that are read. Setting `stop` ends the preview with JobFailed at
    the next tick. Raises CheckpointError, JobError, InputError and StorageError as `run` does before it writes
    anything, and what a Generator raises.
    """
    checkpoint = check_checkpoint(job)
    plan = plan_job(job, checkpoint)
    if plan.prompts.rules < RULES:
        display.tell(OLD_RULES_NOTE)
    tokenizer = load_tokenizer(checkpoint)
    reader = UnitReader(job.input, plan.prompts)
    try:
        rows = choose_rows(
            plan.units,
            reader,
            PromptEncoder(tokenizer, plan.prompts),
            job.generation.params(checkpoint.config.eos_token_ids),
            room=job.engine.limits().row_tokens(checkpoint.config.max_position_embeddings),
            wanted=wanted,
        )
    finally:
        reader.close()
    completions = _Generating(job, display, stop, clock).run(rows, make_generator)
    return Preview(job, plan.prompts, tokenizer.control_tokens, tuple(rows), completions)


class _Generating:
    """Generates the rows and shows the progress."""

    def __init__(self, job: Job, display: Display, stop: threading.Event, clock: Callable[[], float]) -> None:
        self._job, self._display, self._stop, self._clock = job, display, stop, clock
        self._work, self._began = "", clock()

    def run(self, rows: list[PreviewRow], make_generator: Callable[[Job], Generator]) -> Mapping[str, Completion]:
        """Return the completion of each row that has a request, by row key."""
        requests = [shown.request for shown in rows if shown.request is not None]
        if not requests:
            return {}
        self._begin(f"loading {safe_url(self._job.model.checkpoint)}")
        generator = make_generator(self._job)
        try:
            self._display.tell(generator.start(self._tick))
            self._begin(f"generating {counted(len(requests), 'row')}")
            return {done.key: done for done in generator.generate(requests, self._tick)}
        finally:
            generator.close()

    def _begin(self, work: str) -> None:
        self._work, self._began = work, self._clock()
        self._display.show(Progress(work))

    def _tick(self, done: int, expected: int) -> None:
        if self._stop.is_set():
            raise JobFailed("stopped; nothing was written")
        if self._display.due():
            ended = f" · {done:,}/{expected:,} rows" if expected else ""
            text = f"{self._work}{ended} · {duration(self._clock() - self._began)}"
            self._display.show(Progress(text, done, max(1, expected)))
