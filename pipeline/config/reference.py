"""Makes docs/configuration.md from the fields of a job.

`make docs` runs `python -m pipeline.config.reference` and writes its output there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.job import OLD_KEYS, Job
from pipeline.core.text import one_line

HEAD = """# Every setting of a job file

This page is made from `pipeline/config/job.py` by `make docs`. `jobs/synth.yaml` shows all settings in one job file.
A key that is not listed here, or a value of another type, is refused before anything is written. Any setting can be
given on the command line as `--set SECTION.KEY=VALUE`, and a value may hold `${VARIABLE}` or `${VARIABLE:-default}`.
"""
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
"""The keyword of a JSON schema that sets a limit -> the words for it on the page."""
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "array": "list",
    "null": "null",
    "boolean": "true or false",
}
"""The type in a JSON schema -> the words for it on the page."""
Schema = Mapping[str, Any]
"""A JSON schema, or the schemas that it defines by name."""


def make_reference() -> str:
    """Return docs/configuration.md: a table of settings for the top level and each section of a job file."""
    schema = Job.model_json_schema()
    lines = [HEAD, *_table("The top level", schema, schema["$defs"])]
    for path, section in _sections(schema, schema["$defs"]):
        lines += _table(f"`{path}:`", section, schema["$defs"])
    old = [f"- `{old}:` is the old name of `{new}:` and still works." for old, new in OLD_KEYS.items()]
    return "\n".join([*lines, "## Old names", "", *old, ""])


def _sections(schema: Schema, defs: Schema, above: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield (path in the job file, schema) for each section, outer ones first."""
    for key, field in schema["properties"].items():
        section = _section(field, defs)
        if section is not None:
            yield f"{above}{key}", section
            yield from _sections(section, defs, f"{above}{key}.")


def _section(field: Schema, defs: Schema) -> Schema | None:
    """Return the schema of the section that a field holds; None for a single setting."""
    name = field.get("$ref", "").removeprefix("#/$defs/")
    return defs[name] if name else None


def _table(title: str, section: Schema, defs: Schema) -> Iterator[str]:
    """Yield the lines of a section's heading and table. For a setting that is a section, the table only names it."""
    yield from (f"## {title}", "", _cell(section["description"]), "")
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for key, field in section["properties"].items():
        inner = _section(field, defs)
        if inner is not None:
            yield f"| `{key}` | a section, see below | | {_cell(inner['description'])} |"
        else:
            required = key in section.get("required", ())
            default = "required" if required else f"`{_yaml(field.get('default'))}`"
            yield f"| `{key}` | {_values(field)} | {default} | {_cell(field.get('description', ''))} |"
    yield ""


def _values(field: Schema) -> str:
    """Return what a setting may hold, in words: types, choices and limits."""
    if "anyOf" in field:
        return ", ".join(_values(each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    limits = [f"{word} {field[keyword]:g}" for keyword, word in LIMITS.items() if keyword in field]
    return " ".join([TYPES[field["type"]], *limits])


def _yaml(value: object) -> str:
    """Return a default as a job file writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value in ((), []) else str(value)


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


if __name__ == "__main__":
    print(make_reference(), end="")
