"""Writes settings as job files in YAML that pipeline.config.loader reads back unchanged."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config.loader import Plain


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that writes text in quotes, so that the loader never reads it as a number. Keys and Plain text
    are written without quotes where YAML allows it."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (the base class gives the name)
        """Return True: a list that is used twice is written in full twice."""
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        plain = [(Plain(key), value) for key, value in mapping.items()]
        return super().represent_mapping(tag, plain, flow_style)


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
_Dumper.add_representer(Plain, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text)))


def to_yaml(settings: Mapping[str, Any], comments: Sequence[str]) -> bytes:
    """Return the content of a job file with these settings, after one line for each comment.

    `${` in a text is written as it is, so the loader takes it for a variable; without_variables prevents this. Text is
    written in quotes unless it is Plain.
    """
    text = yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, width=1 << 30, allow_unicode=True)
    return ("".join(f"# {comment}\n" for comment in comments) + text).encode()


def without_variables(value: Any) -> Any:
    """Return a copy of the settings with each `${` in a text replaced by `$${`, which the loader reads as `${`."""
    if isinstance(value, dict):
        return {key: without_variables(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_variables(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
