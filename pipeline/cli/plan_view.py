"""Shows what a job would do, without writing anything, for the command `plan JOB`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.calibration.results.estimate import Estimate, estimate
from pipeline.cli.plan_sample import PlanSample, sample_plan
from pipeline.config.job import Job
from pipeline.core.text import counted, printable, shorten, visible
from pipeline.output.begun import OLD_RULES_NOTE, plan_job
from pipeline.output.layout import PLAN
from pipeline.output.ledger import Ledger, read_status
from pipeline.planning.checkpoint import check_checkpoint, load_tokenizer
from pipeline.planning.fingerprint import NAMED_AT_MOST, listing_change
from pipeline.planning.plan import Plan
from pipeline.prompts.setup import RULES
from pipeline.prompts.template import hidden_words, reads_all_columns
from pipeline.report.row_view import wrapped
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

LINE_CHARS, SHOWN_LINES = 69, 3
"""The columns of a line in which a prompt is shown, so that 80 are enough, and the most such lines; wide characters may
take more of them."""
REASONS = 5
"""The most reasons for rows without a usable prompt that are shown."""


@dataclass(frozen=True, slots=True)
class PlanView:
    """A view of what a job would do: its plan, what is done, and what a sample of its rows says about the rest."""

    job: Job
    plan: Plan
    done_units: int
    """Published units."""
    done_rows: int
    """Rows of the published units."""
    sample: PlanSample
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
        """Yield the view for the operator, line by line."""
        job, plan, left = self.job, self.plan, self.plan.rows - self.done_rows - self.saved_rows
        generation, workers = job.generation, job.workers
        yield f"job        {job.name}"
        yield f"input      {safe_url(job.input.path)}: {counted(len(plan.files), 'file')}, {counted(plan.rows, 'row')}"
        yield f"units      {len(plan.units):,} of {job.output.part_limit}{self._packed()}"
        if self.added:
            rows = sum(file.rows for file in plan.files if file.name in set(self.added))
            named = ", ".join(self.added[:NAMED_AT_MOST]) + (" …" if len(self.added) > NAMED_AT_MOST else "")
            yield f"added      {counted(len(self.added), 'file')}, {counted(rows, 'row')} since the last run: {named}"
        done = f"{counted(self.done_units, 'unit')}, {counted(self.done_rows, 'row')}"
        saved = f", and {counted(self.saved_rows, 'row')} of unfinished units" if self.saved_rows else ""
        yield f"done       {done}{saved}; left: {counted(left, 'row')}"
        yield from self._prompt_lines(left)
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

    def _prompt_lines(self, left: int) -> Iterator[str]:
        """Yield the lines about prompts: what they are made of, some of them, and why rows have none."""
        sample, setup = self.sample, self.plan.prompts
        if setup.rules < RULES:
            yield f"note       {OLD_RULES_NOTE}"
        if setup.template is not None:
            yield f"columns    {_made_of(setup.template, setup.columns)}"
        if sample.rows:
            tokens = round(sample.tokens / sample.rows * left)
            exact = sample.rows == self.plan.rows and not self.done_rows
            estimate = f" left (estimate from a sample of {counted(sample.rows, 'row')})"
            yield f"prompts    {'' if exact else 'about '}{tokens:,} tokens{'' if exact else estimate}"
        for rank, prompt in sample.prompts:
            control = f" with {counted(prompt.control, 'control token')}" if prompt.control else ""
            yield f"{rank:<10} {printable(prompt.key)}, {counted(prompt.tokens, 'token')}{control}:"
            text = visible(prompt.text, SHOWN_LINES * LINE_CHARS)
            yield from (f"           {line}" for line in wrapped(text, LINE_CHARS))
        if sample.bad:
            usable = "usable prompt and settings" if self.job.input.row_settings.columns else "usable prompt"
            yield f"bad rows   {sample.bad:,} of {sample.rows:,} sampled rows have no {usable}:"
        for rows, example in sample.reasons[:REASONS]:
            text = f"{counted(rows, 'row')}, the first {visible(example, SHOWN_LINES * LINE_CHARS)}"
            yield from (f"           {line}" for line in wrapped(text, LINE_CHARS))
        if len(sample.reasons) > REASONS:
            yield f"           and rows with {counted(len(sample.reasons) - REASONS, 'other reason')}"
        if self.refusal:
            limit = f"retry.max_error_rate {self.job.retry.max_error_rate:g}"
            yield f"           above {limit}: `run` would end with an error"

    def _packed(self) -> str:
        """Return text such as `; 300 files share 2 of them`, or "" if no unit has rows of several files."""
        shared = [len(unit.pieces) for unit in self.plan.units if len(unit.pieces) > 1]
        return f"; {sum(shared):,} files share {len(shared):,} of them" if shared else ""

    @property
    def refusal(self) -> str | None:
        """Return the reason why `run` would probably end with an error: too many rows have no usable prompt."""
        sample, limit = self.sample, self.job.retry.max_error_rate
        if sample.bad_share <= limit:
            return None
        return (
            f"{sample.bad:,} of {sample.rows:,} sampled rows cannot be generated, {sample.bad_share:.0%}, above "
            f"retry.max_error_rate {limit:g}: `run` would end with an error"
        )

    def _completion_tokens(self, left: int) -> str:
        each, column = self.job.generation.max_new_tokens, self.job.input.row_settings.max_new_tokens
        if column is None:
            return f"{left * each:,} tokens left ({each:,} per row)"
        if not self.sample.rows:
            return f"as column {column} says"
        tokens = round(self.sample.new_tokens / self.sample.rows * left)
        return f"about {tokens:,} tokens left (by column {column}, estimate from the same sample)"


def view_plan(job: Job, calibration: str | None = None) -> PlanView:
    """Plan the job, sample its prompts and look up its calibration: in the folder `calibration`, or by default in the
    folder to which `calibrate` writes.

    Raises JobError, CheckpointError, InputError, StorageError, and OutputError if `run` would refuse the output.
    """
    checkpoint = check_checkpoint(job)
    plan = plan_job(job, checkpoint, allow_unreadable=True)
    done_units, done_rows, saved, added = _done(job, plan)
    room = job.engine.limits().row_tokens(checkpoint.config.max_position_embeddings)
    sample = sample_plan(job, plan, load_tokenizer(checkpoint), room)
    usable = round((plan.rows - done_rows - saved) * (1 - sample.bad_share))
    found = estimate(job, plan, checkpoint.identity(), calibration, usable)
    return PlanView(job, plan, done_units, done_rows, sample, saved, added, found)


def _made_of(template: str, columns: Sequence[str]) -> str:
    """Return what a template reads, for people."""
    if reads_all_columns(template, columns):
        return f"the template reads all {counted(len(columns), 'column')}, because it uses `row` without a fixed name"
    text = shorten(f"the template reads {', '.join(printable(name) for name in columns)}", SHOWN_LINES * LINE_CHARS)
    words = hidden_words(template, columns)
    return text + "".join(f"; `{name}` is a column here, not the template's own word" for name in words)


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
