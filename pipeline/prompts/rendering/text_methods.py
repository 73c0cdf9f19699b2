"""Calls methods of texts, bytes, lists and structs in templates so that nulls and control tokens count as they should.

A control token of a template is one character, its mark. Methods that measure a text get the tokens spelled out.
Methods that search for something in a text find a token of the template and a text that spells it. Characters that are
made of bytes, codes or numbers cannot become marks.
"""

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from pipeline.prompts.rendering.marks import FIRST_MARK, Marks
from pipeline.prompts.rendering.nulls import Null, text_of

_MEASURING = frozenset({"find", "rfind", "index", "rindex", "count", "startswith", "endswith", "encode"})
_SEARCHING = frozenset(
    {
        *("split", "rsplit", "partition", "rpartition", "replace", "removeprefix", "removesuffix"),
        *("strip", "lstrip", "rstrip"),
    }
)
_DECODING = frozenset({"striptags", "unescape"})
"""The methods of HTML texts that make characters of codes such as &#233;."""


def prepare_call(
    marks: Marks, method: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]:
    """Return the method and the arguments to call instead, and whether its result has to be escaped.

    Raises NullError if a null is an argument and nulls have no text, and ValueError for a table of `translate` that
    makes marks.
    """
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(owner, str):
        args = tuple(text_of(value) if isinstance(value, Null) else value for value in args)
        if name == "join" and args and isinstance(args[0], list | tuple):
            args = ([text_of(value) if isinstance(value, Null) else value for value in args[0]], *args[1:])
        return _prepare_text(marks, owner, method, args, named) if marks else (method, args, named, False)
    if not marks:
        return method, args, named, False
    if isinstance(owner, dict) and args and isinstance(args[0], str):
        args = (key_in(marks, owner, args[0]), *args[1:])
    elif isinstance(owner, list | tuple) and name in ("count", "index"):
        method, args = getattr(marks.spelled(owner), name), tuple(map(marks.spelled, args))
    return method, args, named, isinstance(owner, bytes)


def _prepare_text(
    marks: Marks, owner: str, method: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]:
    name = method.__name__
    if name in _MEASURING or (name in _DECODING and isinstance(owner, Markup)):
        spelled = type(owner)(marks.spelled(str(owner)))
        return getattr(spelled, name), tuple(map(marks.spelled, args)), named, name in _DECODING
    if name in _SEARCHING:
        if args:
            text, wanted = searched(marks, owner, args[0])
            return getattr(text, name), (wanted, *args[1:]), named, False
        if "sep" in named:
            text, wanted = searched(marks, owner, named["sep"])
            return getattr(text, name), (), {**named, "sep": wanted}, False
    if name == "translate" and args:
        table = args[0].values() if isinstance(args[0], dict) else args[0]
        if any(isinstance(to, int) and to >= FIRST_MARK for to in table):
            raise ValueError("translate makes a character of a number: use a text")
    return method, args, named, False


def key_in(marks: Marks, values: dict[Any, Any], key: str) -> Any:
    """Return the key of a struct that spells the same as `key`, or `key` if there is none. Both may hold marks."""
    if key in values:
        return key
    plain = marks.spelled(key)
    return next((each for each in values if marks.spelled(each) == plain), key)


def searched(marks: Marks, text: str, wanted: Any) -> tuple[str, Any]:
    """Return a text and what to search for in it, so that both a control token and a text that spells it are found.

    If the text holds both, its control tokens of this kind count as text.
    """
    if not isinstance(wanted, str) or (plain := marks.spelled(wanted)) == wanted or wanted not in text:
        return text, marks.spelled(wanted)
    if plain not in text:
        return text, wanted
    return type(text)(marks.spelled_in(text, wanted)), plain
