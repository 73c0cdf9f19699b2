"""Makes the text of a preview, for a terminal or a log: the rows with their completions, and the totals."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

from model.requests import Completion
from pipeline.core.repetition import DEGENERATE, repetition
from pipeline.core.text import LINE_END, counted, one_line, visible
from pipeline.core.types import Row
from pipeline.preview.rows import PreviewRow
from pipeline.preview.run import Preview
from pipeline.prompts.values import with_brackets
from pipeline.report.row_view import wrapped
from pipeline.storage.urls import safe_url

PROMPT_CHARS = 800
"""Number of characters that are shown of a longer prompt, at its beginning and its end."""
NAME_CHARS = 60
"""Number of characters that are shown of a longer row key, id or control token."""
TOKENS_NAMED = 8
"""Maximum number of different control tokens that are named for a row."""
REASONS, REASON_CHARS = 3, 100
"""Maximum number of reasons in the totals for rows that were not generated, and of characters in each."""
INDENT = "  "


class View:
    """The text of a preview. Texts of the input and of the model cannot control the terminal."""

    def __init__(self, preview: Preview, *, width: int, full: bool) -> None:
        """`width`: columns of the terminal. `full`: prompts are not shortened."""
        self._preview, self._width, self._full = preview, width, full
        longest_first = sorted(preview.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def lines(self) -> Iterator[str]:
        """Yield the job in one line, then its rows in input order. Of the rows that were not generated, only the first
        are shown: as many as there are others, but at least one."""
        preview = self._preview
        job = preview.job
        yield f"job {job.name}: the first rows of {safe_url(job.input.path)}, mode {job.generation.mode}"
        reasons = [preview.reason(shown) for shown in preview.rows]
        bad_left = max(1, reasons.count(None))
        for shown, reason in zip(preview.rows, reasons, strict=True):
            if reason is None:
                yield from self._row(shown, preview.completions[shown.row.key])
            elif bad_left:
                bad_left -= 1
                yield from self._bad_row(shown, reason)

    def totals(self, command: str) -> Iterator[str]:
        """Yield the last lines: what was generated, how many rows were not and why, and the command to go on with."""
        preview = self._preview
        reasons = [reason for reason in map(preview.reason, preview.rows) if reason is not None]
        done = [each for each in preview.completions.values() if each.finish_reason != "error"]
        yield "─" * self._width
        tokens, forwards = sum(len(each.token_ids) for each in done), sum(each.denoiser_forwards for each in done)
        yield f"generated  {counted(len(done), 'row')}: {_amounts(tokens, forwards)}"
        if reasons:
            text = f"{len(reasons):,} of the first {counted(len(preview.rows), 'row')}: {most_frequent(reasons)}"
            yield from self._labelled("error rows", text)
            limit = preview.job.retry.max_error_rate
            if len(reasons) > limit * len(preview.rows):
                yield from self._labelled(
                    "", f"more than retry.max_error_rate {limit:g} allows: `run` may end with an error"
                )
        yield "written    nothing"
        if done:
            yield f"next       {command}"

    def _row(self, shown: PreviewRow, done: Completion) -> Iterator[str]:
        yield self._header(shown)
        prompt = shown.row.prompt or ""
        yield f"prompt     {counted(done.prompt_tokens, 'token')}, {counted(len(prompt), 'character')}"
        text = visible(with_brackets(prompt, shown.row.control), None if self._full else PROMPT_CHARS)
        yield from self._block(text.replace(LINE_END, LINE_END + "\n").removesuffix("\n"))
        if tokens := self._control_tokens(shown.row):
            yield from self._labelled("control", tokens)
        if settings := shown.row.settings:
            texts = (
                f"{one.name} {visible(str(one.value), NAME_CHARS)} (column {visible(one.column, NAME_CHARS)})"
                for one in settings
            )
            yield from self._labelled("settings", ", ".join(texts))
        facts = f"{done.finish_reason}; {_amounts(len(done.token_ids), done.denoiser_forwards)}"
        yield from self._labelled("completion", f"{facts}, {done.latency_s:.2f} s")
        yield from self._block(_harmless(done.text or ""))
        if loop := self._loop(shown, done):
            yield from self._labelled("loop", loop)

    def _bad_row(self, shown: PreviewRow, reason: str) -> Iterator[str]:
        yield self._header(shown)
        yield from self._labelled("error", visible(one_line(reason)))

    def _header(self, shown: PreviewRow) -> str:
        key = visible(shown.row.key, NAME_CHARS)
        row_id = "null" if shown.id is None else visible(shown.id, NAME_CHARS)
        title = f"── row {key} " if shown.id == shown.row.key else f"── row {key}, id {row_id} "
        return title + "─" * max(2, self._width - cell_len(title))

    def _control_tokens(self, row: Row) -> str:
        """Return the control tokens of the prompt as text, each with its number."""
        setup, prompt = self._preview.prompts, row.prompt or ""
        if setup.rules == 1 or setup.special_tokens == "all":
            found = self._control.findall(prompt) if self._control else []
        else:
            found = [prompt[start:end] for start, end in row.control]
        counts = Counter(found).most_common()
        named = [f"{visible(token, NAME_CHARS)} x {count:,}" for token, count in counts[:TOKENS_NAMED]]
        return ", ".join(named) + (" …" if len(counts) > TOKENS_NAMED else "")

    def _loop(self, shown: PreviewRow, done: Completion) -> str:
        """Return a remark about a completion that is a loop, or "" if it is none."""
        params = shown.request.params if shown.request else None
        looped = repetition(done.token_ids, params.eos_ids if params else ())
        if looped < DEGENERATE:
            return ""
        generation = self._preview.job.generation
        again = generation.on_degenerate == "retry" and generation.mode != "ar"
        what = "; `run` would generate it again with more careful settings" if again else ""
        return f"{looped:.0%} of the completion repeats itself{what}"

    def _labelled(self, label: str, text: str) -> Iterator[str]:
        """Yield a label and a text, wrapped."""
        for line in self._wrapped(text, self._width - 11):
            yield f"{label:<10} {line.rstrip()}"
            label = ""

    def _block(self, text: str) -> Iterator[str]:
        """Yield the lines of a text, wrapped and indented."""
        for line in text.split("\n"):
            yield from (f"{INDENT}{piece}" for piece in self._wrapped(line, self._width - len(INDENT)))

    def _wrapped(self, line: str, width: int) -> list[str]:
        return list(wrapped(line, max(20, width))) or [""]


def most_frequent(reasons: Sequence[str]) -> str:
    """Return the most frequent of the reasons as text, each with its number."""
    counts = Counter(reasons).most_common()
    named = [f"{count:,} x {visible(one_line(reason), REASON_CHARS)}" for reason, count in counts[:REASONS]]
    return "; ".join(named) + ("; …" if len(counts) > REASONS else "")


def _amounts(tokens: int, forwards: int) -> str:
    text = counted(tokens, "token")
    if not forwards:  # in AR mode
        return text
    return f"{text} in {counted(forwards, 'denoiser forward')} ({tokens / forwards:.2f} per forward)"


def _harmless(text: str) -> str:
    """Return a completion as it is, but with escapes in place of characters that would control a terminal."""
    pieces = text.replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join("\\".join(map(visible, piece.split("\\"))) for piece in pieces)
