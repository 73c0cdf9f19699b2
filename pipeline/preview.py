"""What a job would do, found out without writing anything: `plan JOB`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from model.tokenizer import Tokenizer
from pipeline.dataset import UnitReader
from pipeline.fingerprint import NAMED_AT_MOST, listing_change
from pipeline.job import Job
from pipeline.layout import PLAN
from pipeline.ledger import Ledger, read_status
from pipeline.paths import safe_url
from pipeline.plan import Plan, make_plan
from pipeline.run import check_checkpoint, load_tokenizer
from pipeline.storage import Storage
from pipeline.types import WorkUnit

SAMPLE_UNITS = 8
SAMPLE_ROWS = 64
"""Rows at the head of each sampled unit."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What would run."""

    job: Job
    plan: Plan
    done_units: int
    done_rows: int
    sampled_rows: int
    sampled_tokens: int
    sampled_bad: int
    """Rows of the sample that could not be generated: null, template error and the like."""
    saved_rows: int = 0
    """Finished, of units that are not."""
    added: tuple[str, ...] = ()
    """Input files that an output which is there already would be extended by."""

    @property
    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of input files."""
        return self.plan.unreadable

    def lines(self) -> Iterator[str]:
        """What an operator wants to know, a line each."""
        job, plan, left = self.job, self.plan, self.plan.rows - self.done_rows - self.saved_rows
        generation, workers = job.generation, job.workers
        yield f"job        {job.name}"
        yield f"input      {safe_url(job.input.path)}: {_count(len(plan.files), 'file')}, {_count(plan.rows, 'row')}"
        yield f"units      {len(plan.units):,} of at most {job.output.rows_per_file:,} rows"
        if self.added:
            rows = sum(file.rows for file in plan.files if file.name in set(self.added))
            named = ", ".join(self.added[:NAMED_AT_MOST]) + (" …" if len(self.added) > NAMED_AT_MOST else "")
            yield f"added      {_count(len(self.added), 'file')}, {_count(rows, 'row')} since the last run: {named}"
        done = f"{_count(self.done_units, 'unit')}, {_count(self.done_rows, 'row')}"
        saved = f", and {_count(self.saved_rows, 'row')} of units under way" if self.saved_rows else ""
        yield f"done       {done}{saved}; left: {_count(left, 'row')}"
        if self.sampled_rows:
            tokens = round(self.sampled_tokens / self.sampled_rows * left)
            sample = _count(self.sampled_rows, "row")
            yield f"prompts    about {tokens:,} tokens left (estimate from a sample of {sample})"
        if self.sampled_bad:
            yield f"bad rows   {self.sampled_bad:,} of {self.sampled_rows:,} sampled rows have no usable prompt"
        most = left * generation.max_new_tokens
        yield f"completion at most {most:,} tokens left ({generation.max_new_tokens:,} a row), mode {generation.mode}"
        yield f"checkpoint {safe_url(job.model.checkpoint)}, {job.model.dtype}"
        yield f"replicas   {workers.replicas}, each with {workers.gpus} GPU and {workers.cpus} CPU"
        yield f"output     {safe_url(job.output.path)}"
        if self.unreadable:
            yield f"unreadable {_count(len(self.unreadable), 'file')}: `run` would refuse"


def preview(job: Job) -> Preview:
    """Plans the job and samples its prompts.

    Raises CheckpointError, InputError, StorageError, and OutputError where `run` would refuse the output.
    """
    checkpoint = check_checkpoint(job)
    plan = make_plan(job, checkpoint_identity=checkpoint.identity(), allow_unreadable=True)
    done_units, done_rows, saved, added = _done(job, plan)
    rows, tokens, bad = _sample(job, plan.units, load_tokenizer(checkpoint))
    return Preview(job, plan, done_units, done_rows, rows, tokens, bad, saved, added)


def _done(job: Job, plan: Plan) -> tuple[int, int, int, tuple[str, ...]]:
    """Finished units, their rows, rows saved of others, and the input files that the output was not planned with."""
    if plan.unreadable:  # with files left out, neither the fingerprint nor the units can be those of the output
        if not Storage(job.output.path).exists(PLAN):
            return 0, 0, 0, ()
        status = read_status(job.output.path)
        return status.units_done, status.rows_done, status.rows_saved, ()
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    old = ledger.check(plan, job)
    results = ledger.finished(plan, repair=False).values()
    same_job = old is not None and old.fingerprint == plan.fingerprint
    added = listing_change(old.files, plan.listing).added if old is not None and same_job else ()
    saved = ledger.count_saved(plan.fingerprint.digest)
    return len(results), sum(result.totals.rows for result in results), saved, added


def _sample(job: Job, units: Sequence[WorkUnit], tokenizer: Tokenizer) -> tuple[int, int, int]:
    """(rows, tokens, rows without a prompt) of the heads of a few units spread over the job."""
    reader = UnitReader(job.input)
    picked = units[:: max(1, -(-len(units) // SAMPLE_UNITS))]
    rows = tokens = bad = 0
    for unit in picked:
        data = reader.read(replace(unit, row_count=min(unit.row_count, SAMPLE_ROWS)))
        prompts = [row.prompt for row in data.rows if row.prompt is not None]
        rows += len(data.rows)
        bad += len(data.rows) - len(prompts)
        tokens += sum(len(ids) for ids in tokenizer.encode_batch(prompts))
    reader.close()
    return rows, tokens, bad


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
