"""Wraps jinja2's filters and tests so that nulls, control tokens and objects without a text count as they should."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2 import Undefined, pass_environment

from pipeline.prompts.rendering.cells import to_chat_json, to_json
from pipeline.prompts.rendering.marks import Marks, escape_all
from pipeline.prompts.rendering.nulls import Null, text_of
from pipeline.prompts.rendering.printing import as_printed, as_text, format_text, join_texts
from pipeline.prompts.rendering.text_methods import searched

Filter = Callable[..., Any]

_LEFT_OUT = ("random", "pprint")
"""Filters that templates do not have: the same row must give the same prompt in every attempt, and objects are not
printed as Python shows them."""
_TAKES_NULL = frozenset({"default", "d", "tojson", "items"})
"""The filters that a null may be given to."""
_OF_TEXT = frozenset(
    {
        *("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "striptags", "title"),
        *("safe", "trim", "truncate", "upper", "urlize", "wordcount", "wordwrap"),
    }
)
"""The filters that make text of their value."""
_SPELLED = frozenset({"length", "count", "striptags", "urlencode", "wordcount"})
"""The filters that work on the characters of a text, so that they get control tokens spelled out, as plain text."""
_SEARCHED = {"replace": "old", "trim": "chars"}
"""The filters that search for their first argument in a text, with the name of that argument."""


def guarded_filters(filters: dict[str, Filter], marks: Marks, *, chat: bool) -> dict[str, Filter]:
    """Return the filters of jinja2 as templates get them."""
    own = {
        "format": format_text,
        "tojson": to_chat_json if chat else to_json,
        "string": as_text,
        "join": pass_environment(join_texts),
    }
    known = {**filters, **own}
    return {name: _guarded(name, run, marks) for name, run in known.items() if name not in _LEFT_OUT}


def _guarded(name: str, run: Filter, marks: Marks) -> Filter:
    at = 1 if getattr(run, "jinja_pass_arg", None) is not None else 0
    takes_null, of_text, spells, searches = name in _TAKES_NULL, name in _OF_TEXT, name in _SPELLED, name in _SEARCHED

    @wraps(run)
    def guarded(*args: Any, **named: Any) -> Any:
        before, value, rest = args[:at], args[at], args[at + 1 :]
        if isinstance(value, Null) and not takes_null:
            value = text_of(value)
        if of_text:
            value = as_printed(value)
            rest = tuple(_text_argument(argument) for argument in rest)
        elif name == "urlencode" and not isinstance(value, str):
            pairs = value.items() if isinstance(value, dict) else value
            value = [(as_text(key), as_text(item)) for key, item in pairs]
        elif name == "xmlattr" and isinstance(value, dict):
            value = {
                key: item if item is None or isinstance(item, Undefined) else as_text(item)
                for key, item in value.items()
            }
        in_ascii = name == "tojson" and (named.get("ensure_ascii") or rest[:1] == (True,))
        if marks and (spells or in_ascii):
            made = run(*before, marks.spelled(value), *rest, **named)
            return escape_all(made) if isinstance(made, str) else made
        if marks and isinstance(value, str):
            if searches and rest:
                value, wanted = searched(marks, value, rest[0])
                rest = (wanted, *rest[1:])
            elif searches and _SEARCHED[name] in named:
                value, named[_SEARCHED[name]] = searched(marks, value, named[_SEARCHED[name]])
        return run(*before, value, *rest, **named)

    return guarded


def _text_argument(value: Any) -> Any:
    """Return an argument of a filter of texts; None, numbers and booleans, which are settings, stay as they are."""
    if isinstance(value, Null):
        return text_of(value)
    return value if value is None or isinstance(value, str | int | float) else as_text(value)


def guarded_tests(tests: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """Return the tests of jinja2 with the arguments that cells would give: None for a null, and texts without marks."""
    return {name: _guarded_test(run, marks) for name, run in tests.items()}


def _guarded_test(run: Callable[..., Any], marks: Marks) -> Callable[..., Any]:
    @wraps(run)
    def guarded(*args: Any, **named: Any) -> Any:
        values = [None if isinstance(value, Null) else value for value in args]
        return run(*(map(marks.spelled, values) if marks else values), **named)

    return guarded
