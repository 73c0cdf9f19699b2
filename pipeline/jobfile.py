"""Loads a job file: YAML, `${VAR}` from the environment, `--set` overrides. A fault is one line that names the key."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.paths import flaw_of, in_ray_package, is_local, safe_url
from pipeline.storage import read_text

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}|\$\{")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
_INT = re.compile(r"[-+]?\d+")
_NULL = re.compile("null|Null|NULL|~")
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+")
MAX_VALUE_CHARS = 80
MAX_FILE_CHARS, MAX_VALUES = 4_000_000, 10_000
"""Of a job file: aliases of aliases can make billions of values of a few lines."""
_LONG_WORD = re.compile(rf"\S{{{MAX_VALUE_CHARS + 1},}}")


class _Loader(yaml.SafeLoader):
    """Safe YAML without dates (no key is one), with 1e-3 as a number and 1:30 as text, as in YAML 1.2."""

    values = 0
    """Built so far."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile("^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$", re.I), list("-+.0123456789")
)


def load_job(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Job:
    """The job in a local YAML file, with `a.b=value` overrides (values are YAML) put over it.

    Relative input, output and checkpoint paths become absolute ones. Raises JobError: one line that names the file,
    the dotted key, the value and the rule.
    """
    file = os.fspath(path)
    settings, origins = _read(file, overrides)
    settings = _expand_tree(settings, "", file, origins)
    try:
        job = Job.model_validate(settings)
    except ValidationError as error:
        raise JobError(_explain(error, file, origins)) from None
    stem = os.path.splitext(os.path.basename(file))[0].encode("utf-8", "replace").decode()
    job = job.model_copy(update={"name": job.name or stem})
    paths = {"input.path": job.input.path, "output.path": job.output.path, "model.checkpoint": job.model.checkpoint}
    for key, path in paths.items():
        if why := flaw_of(path, chains=is_local(path) and key != "model.checkpoint", pattern=key == "input.path"):
            raise JobError(f"{file}: {origins.get(key, key)} is {_shown(path)}: {why}")
    return _resolve_paths(job, file)


def read_settings(path: str | PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings as they stand in the file, variables not filled in, with the overrides put over them.

    Text that stood without quotes is Plain. Raises JobError where it is no YAML; nothing else is checked.
    """
    return _read(os.fspath(path), overrides)[0]


def _read(file: str, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings, and what to call those that were overridden, by dotted key."""
    settings = _parse_file(file)
    return settings, {key: f"--set {key}" for key in (_apply(settings, text) for text in overrides)}


def _parse_file(file: str) -> dict[str, Any]:
    try:
        text = read_text(file, MAX_FILE_CHARS + 1)
    except UnicodeDecodeError as error:
        raise JobError(f"{file}: not a text file: byte {error.start} is not UTF-8") from None
    except FileNotFoundError:
        raise JobError(f"{file}: there is no such job file") from None
    except IsADirectoryError:
        raise JobError(f"{file}: this is a folder; give the job file in it") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{file}: cannot be read: {error}") from None
    if len(text) > MAX_FILE_CHARS:
        raise JobError(f"{file}: more than {MAX_FILE_CHARS} characters: is it a job file?")
    settings = _parse(text, file)
    if settings is None:
        raise JobError(f"{file}: the file is empty; it needs at least input.path, output.path and model.checkpoint")
    if not isinstance(settings, dict):
        raise JobError(f"{file}: holds a {_kind(settings)}; a job is keys and values such as input, output, model")
    return settings


def _parse(text: str, where: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, "", where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        braces = mark is not None and "${" in "".join(text.splitlines()[mark.line : mark.line + 1])
        hint = "; inside {…} or […] put a value with ${…} in quotes" if braces else ""
        raise JobError(f"{where}{line}: not YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise JobError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise JobError(f"{where}: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _build(loader: _Loader, node: yaml.Node, key: str, where: str) -> Any:
    """Python values of a YAML node. Stricter than the safe loader: keys are text, and none stands twice."""
    loader.values += 1
    if loader.values > MAX_VALUES:
        raise JobError(f"{where}: more than {MAX_VALUES} values: no job has so many, do aliases (*) multiply them?")
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, f"{key}[{i}]", where) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        place = f"{where}, line {node.start_mark.line + 1}: {key}".rstrip(": ")
        unquoted = node.style is None
        if unquoted or node.tag.endswith(":int"):
            _check_number(node.value, place)
        try:
            value = loader.construct_object(node)
        except (ValueError, LookupError, AttributeError) as error:  # what the safe loader's own parsers raise
            kind = node.tag.rpartition(":")[2]
            raise JobError(f"{place} is {_shown(node.value)}: it cannot be read as {kind}") from error
        if node.tag.endswith(":int") and ":" in node.value:
            raise JobError(f"{place} is {_shown(node.value)}: write the number in decimal")
        return Plain(value) if isinstance(value, str) and unquoted else value
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if name is None:
            raise JobError(f"{where}, line {line}: a key must be text")
        full = f"{key}.{name}" if key else name
        if name in built:
            raise JobError(f"{where}, line {line}: {full} stands twice: keep one of them")
        built[name] = _build(loader, value_node, full, where)
    return built


def _check_number(text: str, where: str) -> None:
    """YAML 1.1 reads 010 as 8, other readers as 10."""
    if _LEADING_ZERO.fullmatch(text):
        raise JobError(f"{where} is {_shown(text)}: write the number without leading zeros, or text in quotes")


class Plain(str):
    """A string that stood unquoted: once its variables are filled in, it may turn out to be a number."""

    __slots__ = ()


def _apply(settings: dict[str, Any], override: str) -> str:
    """Puts one `a.b=value` into the settings and returns its dotted key. Raises JobError."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise JobError(f"--set {_short(override)}: write it as section.key=value, such as engine.max_rows=8")
    section = settings
    for depth, part in enumerate(parts[:-1], 1):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise JobError(f"--set {_short(override)}: {'.'.join(parts[:depth])} is not a section")
        section = inner
    section[parts[-1]] = _parse(text, f"--set {key}")
    return ".".join(parts)


def _expand_tree(value: Any, key: str, file: str, origins: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {k: _expand_tree(v, f"{key}.{k}" if key else k, file, origins) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_tree(v, f"{key}[{i}]", file, origins) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    where = f"{file}: {origins.get(key, key)}"
    expanded = _expand(value, where)
    try:
        expanded.encode()
    except UnicodeEncodeError:
        raise JobError(f"{where} holds characters that are not Unicode text (lone surrogate)") from None
    return _as_value(expanded, where) if isinstance(value, Plain) and expanded != value else expanded


def _expand(text: str, where: str) -> str:
    def fill(match: re.Match[str]) -> str:
        if match.group() == "$${":
            return "${"
        if match.group(1) is None:
            raise JobError(f"{where} is {_shown(text)}: ${{ without }}: close it, or write $${{ for the characters")
        if "${" in match.group(1):
            raise JobError(f"{where} is {_shown(text)}: a variable inside a variable: write one ${{NAME:-default}}")
        name, has_default, default = match.group(1).partition(":-")
        if not _NAME.fullmatch(name):
            raise JobError(
                f"{where}: ${{{_short(match.group(1))}}} is no variable: write ${{NAME}} or ${{NAME:-default}}"
            )
        value = os.environ.get(name)
        if has_default:
            return value or default
        if value is None:
            raise JobError(f"{where}: the environment variable {name} is not set: set it or write ${{{name}:-default}}")
        return value

    return _VARIABLE.sub(fill, text)


def _as_value(text: str, where: str) -> str | int | float | None:
    _check_number(text, where)
    if _NULL.fullmatch(text):
        return None
    if _INT.fullmatch(text):
        try:
            return int(text)
        except ValueError:  # thousands of digits
            raise JobError(f"{where} is {_shown(text)}: it cannot be read as int") from None
    if _FLOAT.fullmatch(text) and text[-1:].isdigit():
        return float(text)
    return text


def _resolve_paths(job: Job, file: str) -> Job:
    here = os.getcwd()
    output = job.output.path
    if is_local(output) and not os.path.isabs(output) and in_ray_package(here):
        raise JobError(
            f"{file}: output.path is {output!r}, relative to Ray's temporary copy of the working directory, which is "
            "deleted after the job: give an absolute path on shared storage or an s3:// URL"
        )
    checkpoint = job.model.checkpoint
    if not checkpoint.startswith("builtin:"):
        checkpoint = _absolute(checkpoint)
    return job.model_copy(
        update={
            "input": job.input.model_copy(update={"path": _absolute(job.input.path)}),
            "output": job.output.model_copy(update={"path": _absolute(output)}),
            "model": job.model.model_copy(update={"checkpoint": checkpoint}),
        }
    )


def _absolute(path: str) -> str:
    # Not normpath alone: a trailing slash means nothing locally, and ~ is what a shell would have filled in.
    return os.path.abspath(os.path.expanduser(path)) if is_local(path) else path


def _explain(error: ValidationError, file: str, origins: Mapping[str, str]) -> str:
    faults = [_LONG_WORD.sub(lambda word: _short(word[0]), _explain_one(f, origins)) for f in error.errors()]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return f"{file}: {'; '.join(faults[:3])}{more}"


def _explain_one(fault: ErrorDetails, origins: Mapping[str, str]) -> str:
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location)
    key = next((shown for prefix, shown in origins.items() if dotted == prefix), dotted)
    if fault["type"] == "missing":
        return f"{key} is missing: it has no default"
    if fault["type"] == "extra_forbidden":
        return f"{key} is not a key of a job" + _suggest(location)
    rule = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        # A rule over a whole section: its message names the key itself.
        named = rule.partition(" ")[0] in fault["input"]
        return f"{dotted}.{rule}" if named else f"{dotted}: {rule}"
    return f"{key} is {_shown(fault['input'])}: {_RULES.get(fault['type'], rule[:1].lower() + rule[1:])}"


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
    if len(location) > 2:  # a section inside one: its names are names of settings elsewhere too
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


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "text" if isinstance(value, str) else type(value).__name__


def _shown(value: object) -> str:
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    if "://" in text and isinstance(value, str):
        text = repr(safe_url(value))
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"
