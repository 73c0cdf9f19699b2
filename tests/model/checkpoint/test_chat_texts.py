"""Tests that a checkpoint's chat template and special tokens come from the right file, and that bad files are refused
in one line that names the file."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from model.checkpoint.chat_texts import ChatTexts
from model.checkpoint.reader import BUILTIN, open_checkpoint
from model.errors import CheckpointError

TEMPLATE, CONFIG, MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the built-in checkpoint, which has no chat texts."""
    return Path(shutil.copytree(BUILTIN["noise"], tmp_path / "copy"))


def texts(folder: Path, **files: object) -> ChatTexts:
    """Return the chat texts after writing files: bytes as they are, everything else as JSON."""
    names = {"template": TEMPLATE, "config": CONFIG, "token_map": MAP}
    for key, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / names[key]).write_bytes(raw)
    return open_checkpoint(str(folder)).chat_texts()


def refused(folder: Path, **files: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        texts(folder, **files)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"checkpoint {folder}: ")
    assert message.count(str(folder)) == 1
    return message.removeprefix(f"checkpoint {folder}: ")


@pytest.mark.parametrize("name", BUILTIN)
def test_the_built_in_checkpoints_have_none(name: str) -> None:
    assert open_checkpoint(f"builtin:{name}").chat_texts() == ChatTexts(None, {})


def test_the_template_file_wins(folder: Path) -> None:
    config = {"chat_template": "of the config"}
    assert texts(folder, config=config) == ChatTexts("of the config", {})
    assert texts(folder, template="in Größe\n".encode()) == ChatTexts("in Größe\n", {})
    assert texts(folder, config={"chat_template": 7}).template == "in Größe\n"
    assert texts(folder, template=b"").template == ""


def test_a_list_of_templates_has_a_default(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert texts(folder, config={"chat_template": named}).template == "d"
    assert texts(folder, config={"chat_template": named[:1]}).template is None
    assert texts(folder, config={"chat_template": []}).template is None
    assert texts(folder, config={"chat_template": None}).template is None


def test_tokens_are_strings_or_objects_with_content(folder: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "add_bos_token": True,
        "image_token": "<image>",
        "mask_token": {"lstrip": False},
        "sep_token": 7,
        "model_max_length": 1,
        "additional_special_tokens": ["<x>"],
    }
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
    assert texts(folder, config=config).tokens == tokens
    token_map = {"bos_token": "other", "pad_token": {"content": "<pad>"}, "unk_token": "<unk>", "tokens": "no"}
    assert texts(folder, token_map=token_map).tokens == tokens | {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / CONFIG).unlink()
    assert texts(folder).tokens == {"bos_token": "other", "pad_token": "<pad>", "unk_token": "<unk>"}


def test_the_identity_does_not_hold_them(folder: Path) -> None:
    before = open_checkpoint(str(folder)).identity()
    assert texts(folder, template=b"t", config={"bos_token": "<s>"}, token_map={}).template == "t"
    assert open_checkpoint(str(folder)).identity() == before


def test_chat_texts_cannot_be_changed(folder: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        texts(folder).template = "x"  # type: ignore[misc]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"{\x00}\x00", b"\xef\xbb\xbf{}"])
@pytest.mark.parametrize(("key", "name"), [("config", CONFIG), ("token_map", MAP)])
def test_files_that_are_not_json(folder: Path, key: str, name: str, content: bytes) -> None:
    assert refused(folder, **{key: content}).startswith(f"{name} is not JSON")


@pytest.mark.parametrize(("key", "name"), [("template", TEMPLATE), ("config", CONFIG), ("token_map", MAP)])
def test_files_that_are_not_utf8_or_too_large(folder: Path, key: str, name: str) -> None:
    assert refused(folder, **{key: b'{"bos_token": "\xff"}'}).startswith(f"{name} is not UTF-8")
    assert refused(folder, **{key: b" " * (4 * 2**20 + 1)}).startswith(f"{name} has 4194305 bytes: at most 4194304")
    if key == "template":
        assert texts(folder, template=b" " * 4 * 2**20).template == " " * 4 * 2**20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], f"{CONFIG} holds a JSON list"),
        ({"chat_template": {"default": "x"}}, f"{CONFIG}: chat_template is a JSON dict: it must be a string"),
        ({"chat_template": 3}, f"{CONFIG}: chat_template is a JSON int: it must be a string"),
        ({"chat_template": ["x"]}, f"{CONFIG}: chat_template is a list with 'x'"),
        ({"chat_template": [{"name": 3, "template": "x"}]}, "each entry must be an object of name and template"),
        ({"chat_template": [{"name": "default"}]}, "each entry must be an object of name and template"),
        ({"chat_template": [{"name": "default", "template": None}]}, f"{CONFIG}: chat_template is a JSON NoneType"),
        ({"bos_token": {"content": 3}}, f"{CONFIG}: the content of 'bos_token' is a JSON int: it must be a string"),
        ({"two\nlines_token": {"content": 3}}, "the content of 'two\\nlines_token'"),
        ({"bos_token": "\ud800"}, f"{CONFIG}: 'bos_token' holds '\\ud800', which is not a character"),
        ({"chat_template": "a\udfff"}, f"{CONFIG}: chat_template holds '\\udfff', which is not a character"),
    ],
)
def test_values_of_a_wrong_type(folder: Path, config: object, message: str) -> None:
    assert message in refused(folder, config=config)


def test_the_token_map_is_named_too(folder: Path) -> None:
    assert refused(folder, token_map={"eos_token": {"content": []}}).startswith(f"{MAP}: the content of 'eos_token'")
    assert refused(folder, token_map=[]).startswith(f"{MAP} holds a JSON list")
