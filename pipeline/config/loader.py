"""Loads a job file: YAML with variables (`${VAR}`) from the environment, and `--set` overrides from the command line.

Every error is a JobError of one line that names the file and, if the error is about a setting, its key.
"""

import os
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.job import OLD_KEYS, Job, rename_old_keys
from pipeline.config.messages import MAX_VALUE_CHARS, explain, kind_of, shown
from pipeline.config.variables import Variables, utc_today
from pipeline.core.errors import JobError
from pipeline.core.text import one_line, shorten
from pipeline.storage.storage import read_text
from pipeline.storage.urls import flaw_of, in_ray_package, is_local, safe_url

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
_INT = re.compile(r"[-+]?\d+")
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+")
MAX_FILE_CHARS, MAX_VALUES = 4_000_000, 10_000
"""The most characters and the most values in a job file. Values are limited because YAML aliases of aliases can turn a
few lines into billions of them."""
_QUOTE_TEMPLATE = 'put the template in quotes, as in template: "{{ text }}"'
"""The advice for text with {{…}} or {%…%} that is not in quotes, because YAML reads it as a section or as broken."""
_SINGLE_QUOTES = """inside "…" write '…' in the template, as in template: "{{ row['doc id'] }}\""""
_ENDED_TEMPLATE = re.compile(r""":\s+"[^"]*\{[{%][^"}]*\"""")
"""Matches a template in double quotes that a double quote inside an expression ends."""
_UNQUOTED_TEMPLATE = re.compile(r""":\s+(?!["'])[^"']*\{[{%]""")
_PATHS = frozenset(("input.path", "output.path", "model.checkpoint"))


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads 1e-3 as a number and 1:30 as text, as YAML 1.2 says, and not as YAML 1.1. It reads
    dates as text, because no setting is a date."""

    values = 0
    """The number of values built so far."""


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
    """Return the checked job in a local YAML file, with `a.b=value` overrides applied (their values are YAML).

    Local paths of input, output and checkpoint become absolute, and a job without a name gets the name of the file
    without its ending. Raises JobError with one line that names the file, the dotted key, the value and the rule.
    """
    file = os.fspath(path)
    settings, origins = _read(file, overrides)
    settings = _expand_tree(settings, "", file, origins, Variables(os.environ, utc_today()))
    try:
        job = Job.model_validate(settings)
    except ValidationError as error:
        raise JobError(explain(error, file, origins)) from None
    stem = os.path.splitext(os.path.basename(file))[0].encode("utf-8", "replace").decode()
    job = job.model_copy(update={"name": job.name or stem})
    paths = {"input.path": job.input.path, "output.path": job.output.path, "model.checkpoint": job.model.checkpoint}
    for key, path in paths.items():
        if why := flaw_of(path, chains=is_local(path) and key != "model.checkpoint", pattern=key == "input.path"):
            raise JobError(f"{file}: {origins.get(key, key)} is {shown(path)}: {why}")
    return _resolve_paths(job, file)


def read_settings(path: str | PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings in the file with the overrides applied and the variables not filled in.

    Text without quotes is Plain, and old keys have their current names. Raises JobError if the file cannot be read or
    is not YAML, if an override is malformed, or if a section is given under both its old and its current name. The
    values are not checked.
    """
    return _read(os.fspath(path), overrides)[0]


def _read(file: str, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings under their current keys, and for each setting with an old name or an override a name for
    messages, by dotted key: the name that the user wrote."""
    if not is_local(file):
        raise JobError(f"{safe_url(file)}: a job file must be on this machine: copy it first")
    stands = _parse_file(file)
    try:
        settings = rename_old_keys(stands)
    except ValueError as error:
        raise JobError(f"{file}: {error}") from None
    origins: dict[str, str] = {}
    for old, new in OLD_KEYS.items():
        if old in stands:
            origins |= _names(new, old, stands[old])
    for override in overrides:
        key, written, value = _apply(settings, override)
        # An override replaces everything below its key.
        origins = {name: origin for name, origin in origins.items() if not name.startswith(f"{key}.")}
        origins |= {**_names(key, written, value), key: f"--set {written}"}
    return settings, origins


def _names(key: str, written: str, value: Any) -> dict[str, str]:
    """Return the name that the user wrote for a setting and, if it is a section, for each key in it, by dotted key."""
    inner = value if isinstance(value, dict) else {}
    return {key: written, **{f"{key}.{name}": f"{written}.{name}" for name in inner}}


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
        raise JobError(f"{file}: holds a {kind_of(settings)}; a job is keys and values such as input, output, model")
    return settings


def _parse(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, "", where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        near = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark is not None else ""
        hint = "; inside {…} or […] put a value with ${…} in quotes" if "${" in near else ""
        if _ENDED_TEMPLATE.search(near):
            hint = f"; {_SINGLE_QUOTES}"
        elif _UNQUOTED_TEMPLATE.search(near):
            hint = f"; {_QUOTE_TEMPLATE}"
        raise JobError(f"{where}{line}: not YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:  # raised for characters that YAML does not allow
        raise JobError(f"{where}: not YAML: {one_line(error)}") from None
    except RecursionError:
        raise JobError(f"{where}: nested too deeply") from None


def _build(loader: _Loader, node: yaml.Node, key: str, where: str) -> Any:
    """Return the Python value of a YAML node. Unlike the safe loader, it accepts only text as keys, and each key
    once."""
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
        except (ValueError, LookupError, AttributeError) as error:  # raised by the safe loader's own parsers
            kind = node.tag.rpartition(":")[2]
            raise JobError(f"{place} is {shown(node.value)}: it cannot be read as {kind}") from error
        if node.tag.endswith(":int") and ":" in node.value:
            raise JobError(f"{place} is {shown(node.value)}: write the number in decimal")
        if unquoted and key == "input.template" and _comment_follows(node):
            raise JobError(f"{place}: text after # is a comment, so it would be lost: {_QUOTE_TEMPLATE}")
        return Plain(value) if isinstance(value, str) and unquoted else value
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if name is None:
            template = isinstance(key_node, yaml.MappingNode)
            raise JobError(f"{where}, line {line}: a key must be text" + (f"; {_QUOTE_TEMPLATE}" if template else ""))
        full = f"{key}.{name}" if key else name
        if name in built:
            raise JobError(f"{where}, line {line}: {full} is given twice: keep one of them")
        built[name] = _build(loader, value_node, full, where)
    return built


def _comment_follows(node: yaml.Node) -> bool:
    """Return whether a comment stands behind the value, on the same line."""
    mark = node.end_mark
    rest = mark.buffer[mark.pointer :].partition("\n")[0] if mark.buffer is not None else ""
    return bool(rest.strip().startswith("#"))


def _check_number(text: str, where: str) -> None:
    """Raise JobError if the text is a number with leading zeros: YAML 1.1 reads 010 as 8, other readers as 10."""
    if _LEADING_ZERO.fullmatch(text):
        raise JobError(f"{where} is {shown(text)}: write the number without leading zeros, or text in quotes")


class Plain(str):
    """Text that was written without quotes. Once its variables are filled in, it may turn out to be a number."""

    __slots__ = ()


def _apply(settings: dict[str, Any], override: str) -> tuple[str, str, Any]:
    """Apply one `a.b=value` override to the settings. Return its dotted key under current names, the key as written and
    the value. Raises JobError if the override is malformed."""
    key, equals, text = override.partition("=")
    written = key.strip().split(".")
    if not equals or not all(written):
        raise JobError(f"--set {_shown_override(override)}: write it as section.key=value, such as engine.max_rows=8")
    parts = [OLD_KEYS.get(written[0], written[0]), *written[1:]]
    section = settings
    for depth, part in enumerate(parts[:-1], 1):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise JobError(f"--set {_shown_override(override)}: {'.'.join(written[:depth])} is not a section")
        section = inner
    value = section[parts[-1]] = _parse(text, f"--set {key}")
    return ".".join(parts), ".".join(written), value


def _shown_override(override: str) -> str:
    return shorten(safe_url(override), MAX_VALUE_CHARS)


def _expand_tree(value: Any, key: str, file: str, origins: Mapping[str, str], variables: Variables) -> Any:
    def expand(inner: Any, key: str) -> Any:
        return _expand_tree(inner, key, file, origins, variables)

    if isinstance(value, dict):
        return {k: expand(v, f"{key}.{k}" if key else k) for k, v in value.items()}
    if isinstance(value, list):
        return [expand(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    where = f"{file}: {origins.get(key, key)}"
    expanded = variables.fill(value, where, is_path=key in _PATHS)
    try:
        expanded.encode()
    except UnicodeEncodeError:
        raise JobError(f"{where} holds characters that are not Unicode text (lone surrogate)") from None
    return _as_value(expanded, where) if isinstance(value, Plain) and expanded != value else expanded


def _as_value(text: str, where: str) -> str | int | float | None:
    _check_number(text, where)
    if text in ("null", "Null", "NULL", "~"):
        return None
    if _INT.fullmatch(text):
        try:
            return int(text)
        except ValueError:  # int() refuses thousands of digits
            raise JobError(f"{where} is {shown(text)}: it cannot be read as int") from None
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
    # abspath also drops a trailing slash, which means nothing locally; ~ is replaced as a shell would have done it.
    return os.path.abspath(os.path.expanduser(path)) if is_local(path) else path
