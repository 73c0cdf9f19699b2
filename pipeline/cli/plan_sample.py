"""Samples the rows of a plan, for the command `plan`: what their prompts are, how long, and why rows have none."""

from collections.abc import Iterator
from dataclasses import dataclass

from model.checkpoint.tokenizer import Tokenizer
from pipeline.config.job import Job
from pipeline.core.error_kinds import without_numbers
from pipeline.core.errors import RequestError
from pipeline.core.text import counted
from pipeline.core.types import Row
from pipeline.input.row_settings import with_settings
from pipeline.input.unit_reader import UnitReader
from pipeline.planning.plan import Plan
from pipeline.prompts.encoder import PromptEncoder
from pipeline.prompts.values import with_brackets

SAMPLE_UNITS = 8
"""The maximum number of units of which rows are sampled."""
SAMPLE_ROWS = 64
"""The number of rows that are read from the beginning of each sampled unit."""
SHOWN_CHARS = 4_000
"""The most characters of a prompt of the sample that are kept, half of them from its end."""


@dataclass(frozen=True, slots=True)
class SampledPrompt:
    """The prompt of a row of the sample."""

    key: str
    """The row key, `file#row`."""
    tokens: int
    control: int
    """The control tokens that the template, or the chat template, put into it."""
    text: str
    """The text with brackets around its control tokens. Of a long text, only beginning and end (SHOWN_CHARS)."""


@dataclass(frozen=True, slots=True)
class PlanSample:
    """What a sample of a job's rows says about all of them: the first rows of a few units spread over the job."""

    rows: int = 0
    bad: int = 0
    """The rows that cannot be generated: their prompt is null, fails in the template or is too long, or one of their
    settings is impossible."""
    tokens: int = 0
    """The sum of the prompt tokens of the other rows."""
    new_tokens: int = 0
    """The sum of max_new_tokens of the other rows."""
    prompts: tuple[tuple[str, SampledPrompt], ...] = ()
    """The prompts to show, each with its rank: `shortest`, `median`, `longest`, or `only` if there is one."""
    reasons: tuple[tuple[int, str], ...] = ()
    """Why rows cannot be generated, the most frequent reason first: the number of rows, and the first one as
    `file#row: text`."""

    @property
    def bad_share(self) -> float:
        """Return the share of the rows that cannot be generated; 0 for an empty sample."""
        return self.bad / self.rows if self.rows else 0.0


def sample_plan(job: Job, plan: Plan, tokenizer: Tokenizer, room: int) -> PlanSample:
    """Return a sample of the plan's rows. `room`: the most tokens of a prompt and its completion together."""
    reasons, good = dict[str, list[str]](), list[SampledPrompt]()
    rows = tokens = new_tokens = 0
    for row, count, limit, flaw in _rows(job, plan, tokenizer, room):
        rows += 1
        if flaw is not None:
            reasons.setdefault(without_numbers(flaw), []).append(f"{row.key}: {flaw}")
            continue
        tokens, new_tokens = tokens + count, new_tokens + limit
        good.append(
            SampledPrompt(row.key, count, len(row.control), _ends(with_brackets(row.prompt or "", row.control)))
        )
    good.sort(key=lambda prompt: (prompt.tokens, prompt.key))
    last = len(good) - 1
    # Of two prompts, the first one is the median as well: a later rank of the same prompt counts.
    ranks = {last // 2: "median", 0: "shortest", last: "longest"} if last else {0: "only"}
    shown = tuple((ranks[at], good[at]) for at in sorted(ranks)) if good else ()
    counts = tuple((len(texts), texts[0]) for texts in sorted(reasons.values(), key=len, reverse=True))
    return PlanSample(rows, rows - len(good), tokens, new_tokens, shown, counts)


def _rows(job: Job, plan: Plan, tokenizer: Tokenizer, room: int) -> Iterator[tuple[Row, int, int, str | None]]:
    """Yield (row, prompt tokens, max_new_tokens, the reason why it cannot be generated or None) for sampled rows."""
    params = job.generation.params(())
    reader, encoder = UnitReader(job.input, plan.prompts), PromptEncoder(tokenizer, plan.prompts)
    try:
        for unit in plan.units[:: max(1, -(-len(plan.units) // SAMPLE_UNITS))]:
            data = reader.read(unit.part(0, SAMPLE_ROWS))
            for row, ids in zip(data.rows, encoder.encode(data.rows), strict=True):
                try:
                    limit = with_settings(params, row.settings).max_new_tokens
                except RequestError as error:
                    yield row, len(ids), 0, row.error or str(error)
                else:
                    yield row, len(ids), limit, row.error or _flaw(len(ids), limit, room)
    finally:
        reader.close()


def _flaw(tokens: int, limit: int, room: int) -> str | None:
    if not tokens:
        return "the prompt has no tokens"
    if tokens + limit > room:
        return f"{counted(tokens, 'prompt token')} and max_new_tokens {limit} exceed the context of {room} tokens"
    return None


def _ends(text: str) -> str:
    half = SHOWN_CHARS // 2
    return text if len(text) <= SHOWN_CHARS else f"{text[:half]}{text[-half:]}"
