"""Writes settings as job files in YAML that pipeline.config.loader reads back unchanged."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config.loader import Plain


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that writes text in quotes, so that it is never read as a number, but keys and Plain text
    without."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        plain = [(Plain(key), value) for key, value in mapping.items()]
        return super().represent_mapping(tag, plain, flow_style)


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
_Dumper.add_representer(Plain, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text)))


def to_yaml(settings: Mapping[str, Any], comments: Sequence[str]) -> bytes:
    """Return the content of a job file, with the comments first. Values may contain variables. Only text that is Plain
    is written without quotes."""
    text = yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, width=1 << 30, allow_unicode=True)
    return ("".join(f"# {comment}\n" for comment in comments) + text).encode()


def without_variables(value: Any) -> Any:
    """Return the settings with every `${` in a text escaped, so that it is not read as a variable."""
    if isinstance(value, dict):
        return {key: without_variables(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_variables(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
