"""Finds out what a job would do, without writing anything, for the command `plan JOB`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from model.checkpoint.tokenizer import Tokenizer
from pipeline.calibration.results.estimate import Estimate, estimate
from pipeline.config.job import Job
from pipeline.core.text import counted
from pipeline.core.types import WorkUnit
from pipeline.input.row_settings import with_settings
from pipeline.input.unit_reader import UnitReader
from pipeline.output.layout import PLAN
from pipeline.output.ledger import Ledger, read_status
from pipeline.planning.checkpoint import check_checkpoint, load_tokenizer
from pipeline.planning.fingerprint import NAMED_AT_MOST, listing_change
from pipeline.planning.plan import Plan, make_plan
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

SAMPLE_UNITS = 8
"""The maximum number of units of which rows are sampled."""
SAMPLE_ROWS = 64
"""The number of rows that are read from the beginning of each sampled unit."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A preview of what a job would do: its plan, what is done, and what a sample of its rows says about the rest."""

    job: Job
    plan: Plan
    done_units: int
    """Published units."""
    done_rows: int
    """Rows of the published units."""
    sampled_rows: int
    sampled_tokens: int
    """Prompt tokens of the rows of the sample that can be generated."""
    sampled_bad: int
    """Rows of the sample that cannot be generated: their prompt is null, fails in the template or is too long, or one
    of their settings is impossible."""
    sampled_limits: int = 0
    """The sum of max_new_tokens over the other rows of the sample."""
    saved_rows: int = 0
    """Finished rows of unfinished units, which are saved in segments."""
    added: tuple[str, ...] = ()
    """Names of the input files that would be added to a job whose output exists already."""
    estimate: Estimate | str | None = None
    """The hours and cost of the remaining rows according to a calibration, or the reason why they are unknown; None if
    there is no calibration."""

    @property
    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """Return (name, reason) for each input file that cannot be read, for which `run` would refuse the job."""
        return self.plan.unreadable

    def lines(self) -> Iterator[str]:
        """Yield the preview for the operator, line by line."""
        job, plan, left = self.job, self.plan, self.plan.rows - self.done_rows - self.saved_rows
        generation, workers = job.generation, job.workers
        yield f"job        {job.name}"
        yield f"input      {safe_url(job.input.path)}: {counted(len(plan.files), 'file')}, {counted(plan.rows, 'row')}"
        yield f"units      {len(plan.units):,} of {job.output.part_limit}"
        if self.added:
            rows = sum(file.rows for file in plan.files if file.name in set(self.added))
            named = ", ".join(self.added[:NAMED_AT_MOST]) + (" …" if len(self.added) > NAMED_AT_MOST else "")
            yield f"added      {counted(len(self.added), 'file')}, {counted(rows, 'row')} since the last run: {named}"
        done = f"{counted(self.done_units, 'unit')}, {counted(self.done_rows, 'row')}"
        saved = f", and {counted(self.saved_rows, 'row')} of unfinished units" if self.saved_rows else ""
        yield f"done       {done}{saved}; left: {counted(left, 'row')}"
        if self.sampled_rows:
            tokens = round(self.sampled_tokens / self.sampled_rows * left)
            sample = counted(self.sampled_rows, "row")
            yield f"prompts    about {tokens:,} tokens left (estimate from a sample of {sample})"
        if self.sampled_bad:
            usable = "usable prompt and settings" if job.input.row_settings.columns else "usable prompt"
            yield f"bad rows   {self.sampled_bad:,} of {self.sampled_rows:,} sampled rows have no {usable}"
        if columns := job.input.row_settings.columns:
            named = ", ".join(f"{setting} from {column}" for setting, column in columns.items())
            yield f"per row    {named}; if null, the job's"
        again = ", again if degenerate" if generation.on_degenerate == "retry" and generation.mode != "ar" else ""
        yield f"completion at most {self._completion_tokens(left)}, mode {generation.mode}{again}"
        yield f"checkpoint {safe_url(job.model.checkpoint)}, {job.model.dtype}"
        yield f"replicas   {workers.replicas}, each with {workers.gpus} GPU and {workers.cpus} CPU"
        if isinstance(self.estimate, Estimate):
            yield from self.estimate.lines()
        elif self.estimate is not None:
            yield f"hours      unknown: {self.estimate}"
        yield f"output     {safe_url(job.output.path)}"
        if self.unreadable:
            yield f"unreadable {counted(len(self.unreadable), 'file')}: `run` would refuse the job"

    def _completion_tokens(self, left: int) -> str:
        each, column = self.job.generation.max_new_tokens, self.job.input.row_settings.max_new_tokens
        if column is None:
            return f"{left * each:,} tokens left ({each:,} per row)"
        if not self.sampled_rows:
            return f"as column {column} says"
        tokens = round(self.sampled_limits / self.sampled_rows * left)
        return f"about {tokens:,} tokens left (by column {column}, estimate from the same sample)"


def preview(job: Job, calibration: str | None = None) -> Preview:
    """Plan the job, sample its prompts and look up its calibration: in the folder `calibration`, or by default in the
    folder to which `calibrate` writes.

    Raises JobError, CheckpointError, InputError, StorageError, and OutputError if `run` would refuse the output.
    """
    checkpoint = check_checkpoint(job)
    identity = checkpoint.identity()
    plan = make_plan(job, checkpoint_identity=identity, allow_unreadable=True)
    done_units, done_rows, saved, added = _done(job, plan)
    room = job.engine.limits().row_tokens(checkpoint.config.max_position_embeddings)
    rows, tokens, bad, limits = _sample(job, plan.units, load_tokenizer(checkpoint), room)
    usable = round((plan.rows - done_rows - saved) * (1 - bad / max(rows, 1)))
    found = estimate(job, plan, identity, calibration, usable)
    return Preview(job, plan, done_units, done_rows, rows, tokens, bad, limits, saved, added, found)


def _done(job: Job, plan: Plan) -> tuple[int, int, int, tuple[str, ...]]:
    """Return the number of published units, the number of their rows, the number of saved rows of other units, and the
    names of the input files that are new since the output was planned."""
    if plan.unreadable:  # without these files, neither the fingerprint nor the units can match those of the output
        if not Storage(job.output.path).exists(PLAN):
            return 0, 0, 0, ()
        status = read_status(job.output.path)
        return status.units_done, status.rows_done, status.rows_saved, ()
    ledger = Ledger(job.output.path, plan.fingerprint.digest)
    old = ledger.check(plan, job)
    results = ledger.finished(plan, repair=False).values()
    same_job = old is not None and old.fingerprint == plan.fingerprint
    added = listing_change(old.listing, plan.listing).added if old is not None and same_job else ()
    saved = ledger.count_saved(plan.fingerprint.digest)
    return len(results), sum(result.totals.rows for result in results), saved, added


def _sample(job: Job, units: Sequence[WorkUnit], tokenizer: Tokenizer, room: int) -> tuple[int, int, int, int]:
    """Return (rows, tokens, bad, limits) of a sample: the first rows of a few units spread over the job.

    `bad` is the number of rows that cannot be generated with `room` tokens of context. `tokens` and `limits` are the
    sums of the prompt tokens and of max_new_tokens over the others.
    """
    params = job.generation.params(())
    reader = UnitReader(job.input)
    picked = units[:: max(1, -(-len(units) // SAMPLE_UNITS))]
    rows = tokens = bad = limits = 0
    for unit in picked:
        data = reader.read(replace(unit, row_count=min(unit.row_count, SAMPLE_ROWS)))
        good = [(row.prompt, row.settings) for row in data.rows if row.prompt is not None]
        encoded = tokenizer.encode_batch([prompt for prompt, _ in good])
        most = [with_settings(params, settings).max_new_tokens for _, settings in good]
        fitting = [(len(ids), limit) for ids, limit in zip(encoded, most, strict=True) if 0 < len(ids) <= room - limit]
        rows += len(data.rows)
        bad += len(data.rows) - len(fitting)
        tokens += sum(count for count, _ in fitting)
        limits += sum(limit for _, limit in fitting)
    reader.close()
    return rows, tokens, bad, limits
