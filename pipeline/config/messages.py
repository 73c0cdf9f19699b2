"""Explains in one line what is wrong with a job file: the key, the value and the rule."""

import difflib
import re
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.job import Job
from pipeline.core.text import shorten
from pipeline.storage.urls import safe_url

MAX_VALUE_CHARS = 80
"""The most characters of a user's own text, such as a value, that a message quotes; a longer text is cut off."""
_LONG_WORD = re.compile(rf"\S{{{MAX_VALUE_CHARS + 1},}}")


def explain(error: ValidationError, file: str, origins: Mapping[str, str]) -> str:
    """Return the message about a job file that is refused: one line with three errors and the number of the others.

    `origins` maps the dotted key of a setting to the name that the user wrote for it, such as `--set a.b`, where the
    two differ.
    """
    faults = [
        _LONG_WORD.sub(lambda word: shorten(word[0], MAX_VALUE_CHARS), _explain_one(f, origins)) for f in error.errors()
    ]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return f"{file}: {'; '.join(faults[:3])}{more}"


def _explain_one(fault: ErrorDetails, origins: Mapping[str, str]) -> str:
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location)
    key = next((name for prefix, name in origins.items() if dotted == prefix), dotted)
    if fault["type"] == "missing":
        return f"{key} is missing: it has no default"
    if fault["type"] == "extra_forbidden":
        return f"{safe_url(key)} is not a key of a job" + _suggest(location)
    rule = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        # This rule covers a whole section, and its message names the key itself.
        named = rule.partition(" ")[0] in fault["input"]
        return f"{dotted}.{rule}" if named else f"{dotted}: {rule}" if dotted else rule
    return f"{key} is {shown(fault['input'])}: {_RULES.get(fault['type'], rule[:1].lower() + rule[1:])}"


_RULES = {
    "int_type": "it must be a whole number, without quotes",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number, without quotes",
    "string_type": "it must be text; put it in quotes if it looks like a number",
    "tuple_type": "it must be a list",
    "model_type": "it must be a section with keys of its own",
    "model_attributes_type": "it must be a section with keys of its own",
    "string_too_short": "it must not be empty",
    "finite_number": "it must be a finite number",
}


def _suggest(location: list[str]) -> str:
    section = _section_of(location[:-1])
    known = list(section.model_fields) if section else []
    if len(location) > 2:  # a nested section: its keys also exist in other sections, so that a suggestion would mislead
        return f"; known here: {', '.join(known)}" if known else ""
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    homes = [f"{name}.{location[-1]}" for name, inner in _sections() if location[-1] in inner.model_fields]
    if homes:
        return f"; did you mean {' or '.join(homes)}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _sections(parent: type[BaseModel] = Job) -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in parent.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append((name, kind))
    return found


def _section_of(location: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Job
    for name in location:
        section = dict(_sections(section)).get(name) if section else None
    return section


def kind_of(value: object) -> str:
    """Return the kind of a YAML value in one word for a message: list, text, or the name of its Python type."""
    return "list" if isinstance(value, list) else "text" if isinstance(value, str) else type(value).__name__


def shown(value: object) -> str:
    """Return a value for a message: text in quotes, URLs without credentials, at most MAX_VALUE_CHARS characters."""
    return shorten(repr(_without_credentials(value)), MAX_VALUE_CHARS)


def _without_credentials(value: object) -> object:
    """Return the value with each text in it as safe_url shows it, and as plain str."""
    if isinstance(value, str):
        return safe_url(str(value))
    if isinstance(value, list | tuple):
        return type(value)(map(_without_credentials, value))
    if isinstance(value, dict):
        return {_without_credentials(key): _without_credentials(inner) for key, inner in value.items()}
    return value
