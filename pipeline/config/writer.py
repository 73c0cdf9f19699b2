"""Writes job files: settings as YAML that pipeline.config.loader reads back as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config.loader import Plain


class _Quoted(str):
    """Text that stands in quotes, so that nothing takes it for a number."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')
)
_Dumper.add_representer(Plain, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text)))


def to_yaml(settings: Mapping[str, Any], comments: Sequence[str]) -> bytes:
    """A job file, the comments first. Values may hold variables. Only Plain text stands without quotes."""

    def quoted(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): quoted(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [quoted(inner) for inner in value]
        return _Quoted(value) if isinstance(value, str) and not isinstance(value, Plain) else value

    text = yaml.dump(quoted(dict(settings)), Dumper=_Dumper, sort_keys=False, width=1 << 30, allow_unicode=True)
    return ("".join(f"# {comment}\n" for comment in comments) + text).encode()


def without_variables(value: Any) -> Any:
    """The settings with every `${` in a text written so that it stands for itself."""
    if isinstance(value, dict):
        return {key: without_variables(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_variables(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
