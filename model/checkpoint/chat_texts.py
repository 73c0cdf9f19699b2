"""Takes the chat template and the special tokens for it from the files beside a checkpoint. It does not import torch.

Checkpoint.chat_texts() in model/checkpoint/reader.py reads the files. Their form is that of the transformers library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.errors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"


@dataclass(frozen=True, slots=True)
class ChatTexts:
    """The chat template of a checkpoint, in Jinja, and its special tokens by name (bos_token, eos_token, …)."""

    template: str | None = None
    """None if the checkpoint has no chat template."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Only the tokens that the checkpoint names."""


def chat_texts(template: str | None, config: Mapping[str, Any], token_map: Mapping[str, Any]) -> ChatTexts:
    """Return the chat template and the tokens from the contents of the three files, the JSON files parsed.

    The template in a file of its own wins over the one in tokenizer_config.json, and the tokens in
    tokenizer_config.json win over those in special_tokens_map.json. Raises CheckpointError if a value has a wrong type.
    """
    if template is None:
        template = _template(config.get("chat_template"))
    return ChatTexts(template, _tokens(token_map, MAP_FILE) | _tokens(config, CONFIG_FILE))


def _template(value: object) -> str | None:
    """Return chat_template of tokenizer_config.json: a string, or the one named "default" in a list of templates."""
    if value is None:
        return None
    if isinstance(value, list):
        named: dict[object, object] = {}
        for entry in value:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "template" not in entry:
                raise CheckpointError(
                    f"{CONFIG_FILE}: chat_template is a list with {entry!r:.80}: each entry must be an object of "
                    "name and template"
                )
            named[entry["name"]] = entry["template"]
        if "default" not in named:
            return None
        value = named["default"]
    return _string(value, CONFIG_FILE, "chat_template")


def _tokens(document: Mapping[str, Any], file: str) -> dict[str, str]:
    """Return the tokens of a file: the values of keys ending in `_token` that are strings or objects with "content".

    Other values under such keys are settings (add_bos_token) or null, and are left out.
    """
    found: dict[str, str] = {}
    for name, value in document.items():
        if not name.endswith("_token"):
            continue
        if isinstance(value, dict) and "content" in value:
            found[name] = _string(value["content"], file, f"the content of {name!r:.80}")
        elif isinstance(value, str):
            found[name] = _string(value, file, f"{name!r:.80}")
    return found


def _string(value: object, file: str, name: str) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{file}: {name} is a JSON {type(value).__name__}: it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise CheckpointError(f"{file}: {name} holds {value[error.start]!r}, which is not a character") from error
    return value
