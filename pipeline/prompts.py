"""From the columns of a row to its prompt. A row that has none gets a reason instead, never an exception."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

MAX_ERROR_CHARS = 300
MAX_PROMPT_CHARS = 16_000_000
"""Far above any context; a template that multiplies its columns must not take the memory of the replica."""
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.)", re.DOTALL)


class CellError:
    """A cell that cannot be given to Python as it is; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@lru_cache(maxsize=1)
def _environment() -> "SandboxedEnvironment":
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    class Environment(SandboxedEnvironment):
        """Refuses the operations that make much of little before they do."""

        intercepted_binops = frozenset(("*", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                _check_product(left, right)
            elif isinstance(left, str):
                _check_widths(left, right if isinstance(right, tuple) else (right,))
            return super().call_binop(context, operator, left, right)

    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.filters["format"] = _format
    # Without jinja2's own functions every free name is a column: `range` or `dict` cannot shadow one in silence.
    environment.globals.clear()
    return environment


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template reads, sorted. Raises ValueError where the template does not parse or reads none."""
    from jinja2 import TemplateSyntaxError, meta

    try:
        columns = meta.find_undeclared_variables(_environment().parse(template))
        _environment().from_string(template)  # unknown filters and tests show up only here
    except TemplateSyntaxError as error:
        raise ValueError(f"template, line {error.lineno}: {error.message}") from None
    if not columns:
        raise ValueError("template reads no column, so all prompts would be the same: use {{ column }}")
    return tuple(sorted(columns))


class PromptMaker:
    """Makes the prompts of a job's rows, from one column or from a template over several."""

    def __init__(self, prompt_column: str | None, template: str | None) -> None:
        """One of the two. Raises ValueError where the template is wrong."""
        self._template = None
        self.columns: tuple[str, ...] = (prompt_column,) if prompt_column is not None else ()
        if template is not None:
            self.columns = template_columns(template)
            self._template = _environment().from_string(template)

    def make(self, table: pa.Table) -> Iterator[tuple[str | None, str | None]]:
        """(prompt, None) or (None, reason) for each row of a table that has `columns`."""
        columns = [read_cells(table[name]) for name in self.columns]
        for row in zip(*columns, strict=True):
            yield self._make_one(row)

    def _make_one(self, cells: tuple[Any, ...]) -> tuple[str | None, str | None]:
        for name, cell in zip(self.columns, cells, strict=True):
            if isinstance(cell, CellError):
                return None, f"column '{name}' {cell.reason}"
        if self._template is None:
            prompt = cells[0]
        else:
            try:
                prompt = _join(self._template.generate(zip(self.columns, cells, strict=True)))
            except Exception as error:  # a template is the user's code: it can raise anything, and costs its row alone
                return None, f"template: {_one_line(error)}"
        if prompt is None:
            return None, "prompt is null"
        if prompt == "":
            return None, "prompt is empty"
        if len(prompt) > MAX_PROMPT_CHARS:
            return None, f"prompt has {len(prompt)} characters or more, above the {MAX_PROMPT_CHARS} of any prompt"
        try:
            prompt.encode()
        except UnicodeEncodeError:
            return None, "prompt holds characters that are not Unicode text (lone surrogate)"
        return prompt, None


def _join(pieces: Iterator[str]) -> str:
    """The rendered text, up to the piece that makes it too long."""
    taken, length = [], 0
    for piece in pieces:
        taken.append(piece)
        length += len(piece)
        if length > MAX_PROMPT_CHARS:
            break
    return "".join(taken)


def _format(text: str, *values: Any, **named: Any) -> str:
    """jinja2's filter, with widths checked."""
    from jinja2.filters import do_format

    _check_widths(str(text), values)
    return do_format(text, *values, **named)


def _check_widths(text: str, values: tuple[Any, ...]) -> None:
    following = iter(values)
    for width, precision, conversion in _CONVERSION.findall(text):
        for size in (width, precision):
            number = next(following, 0) if size == "*" else int(size or 0)
            if isinstance(number, int) and abs(number) > MAX_PROMPT_CHARS:
                raise ValueError(f"a format with a width above {MAX_PROMPT_CHARS}")
        if conversion != "%":
            next(following, None)


def _check_product(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(times, int) and len(text) * times > MAX_PROMPT_CHARS:
            raise ValueError(f"a product of more than {MAX_PROMPT_CHARS} characters")


def read_cells(column: "pa.ChunkedArray[Any]") -> list[Any]:
    """The column as Python values; a cell that Python cannot hold (not UTF-8, a year 99999) is a CellError."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
        return [_read_cell(scalar) for scalar in column]


def _read_cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return CellError(f"holds bytes that are not UTF-8 (byte {error.start})")
    except (ValueError, OverflowError) as error:
        return CellError(f"holds a value that cannot be read: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    text = " ".join(f"{error}".split()) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()  # it may quote a lone surrogate
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"
