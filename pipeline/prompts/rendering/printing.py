"""Makes text of the values that templates print, and refuses formats that would make huge or forged texts.

Only values that have a text of their own are printed. An object such as a function would print as the address at which
it happens to be in memory.
"""

import re
from collections.abc import Iterable
from typing import Any

from jinja2 import Undefined
from jinja2.filters import do_format, make_attrgetter
from jinja2.sandbox import SandboxedFormatter
from markupsafe import EscapeFormatter

from pipeline.prompts.rendering.cells import HAVE_TEXT, LISTS, ListCell, StructCell, no_text, to_json
from pipeline.prompts.rendering.nulls import Null, NullError, text_of
from pipeline.prompts.values import MAX_PROMPT_CHARS

_CONVERSION = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.)", re.DOTALL)
_NESTED_KEY = re.compile(r"%\([^)]*\(")


def as_printed(value: Any) -> Any:
    """Return what is printed for the value of an expression: its text, or the value if its str() is that text.

    Lists, structs and maps become JSON. Raises NullError for a null, and TypeError for a value that has no text of its
    own, such as a function.
    """
    return value if type(value) is str else as_text(value)


def as_text(value: Any) -> str:
    """Return the text of any value, as `as_printed` does."""
    if isinstance(value, (*HAVE_TEXT, Undefined)):
        return str(value)
    if value is None:
        raise NullError("an expression prints none: give it a value, as {{ x | default('', true) }} does")
    if isinstance(value, LISTS):
        return to_json(value)
    raise no_text(value)


def as_argument(value: Any) -> Any:
    """Return a value whose str() is its text, to be put into a format: the value itself, or one that wraps it."""
    if isinstance(value, Null):
        return text_of(value)
    if isinstance(value, HAVE_TEXT):
        return value
    if isinstance(value, dict):
        return _Arguments(value)
    return ListCell(value) if isinstance(value, list | tuple) else as_text(value)


class _Arguments(StructCell):
    """The arguments of a format by name."""

    def __getitem__(self, key: Any) -> Any:
        return as_argument(super().__getitem__(key))


def join_texts(environment: Any, values: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    """Return the texts of the values with `d` between them (the filter `join`)."""
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return as_text(d).join([as_text(value) for value in values])


def format_text(text: Any, *values: Any, **named: Any) -> str:
    """Return the result of jinja2's filter `format`. Raises ValueError first if a conversion is refused."""
    check_conversions(as_text(text), values)
    arguments = {name: as_argument(value) for name, value in named.items()}
    return do_format(as_printed(text), *map(as_argument, values), **arguments)


def check_conversions(text: str, values: tuple[Any, ...]) -> None:
    """Raise ValueError if a conversion of `%` has a huge width, or could make a character that is a mark."""
    if _NESTED_KEY.search(text):
        raise ValueError("a format with a parenthesis in the name of a value: use another name")
    following = iter(values)
    for width, precision, conversion in _CONVERSION.findall(text):
        for size in (width, precision):
            number = next(following, 0) if size == "*" else int(size or 0)
            if isinstance(number, int) and abs(number) > MAX_PROMPT_CHARS:
                raise ValueError(f"a format with a width above {MAX_PROMPT_CHARS}")
        if conversion in ("r", "a"):
            raise ValueError(f"a format with %{conversion}: use %s, or the filter tojson")
        if conversion != "%":
            value = next(following, None)
            if conversion == "c" and not isinstance(value, str):
                raise ValueError("a format with %c: use a text, not the number of a character")


def check_product(left: Any, right: Any) -> None:
    """Raise ValueError if a product of a text or a list and a number would be huge."""
    for text, times in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(times, int) and len(text) * times > MAX_PROMPT_CHARS:
            raise ValueError(f"a product of more than {MAX_PROMPT_CHARS} characters")


class Formatter(SandboxedFormatter):
    """The formatter of str.format in templates. It makes no characters of numbers, which could be marks."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """See string.Formatter. Raises ValueError for the conversions that show values as Python does."""
        if conversion in ("r", "a"):
            raise ValueError(f"a format with !{conversion}: use {{}}, or the filter tojson")
        return super().convert_field(as_argument(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        """See string.Formatter. Raises ValueError for the conversion `c` of a number."""
        if isinstance(value, int) and format_spec.endswith("c"):
            raise ValueError("a format with :c: use a text, not the number of a character")
        known = value if isinstance(value, HAVE_TEXT) else as_text(value)
        return super().format_field(known, format_spec)


class EscapingFormatter(Formatter, EscapeFormatter):
    """The formatter of a text that is marked as HTML: it escapes the values."""
