import json

import pytest

from model.checkpoint.reader import open_checkpoint
from model.checkpoint.tokenizer import Tokenizer
from model.errors import CheckpointError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    content = open_checkpoint("builtin:noise").tokenizer_json()
    assert content is not None
    return Tokenizer(content)


@pytest.mark.parametrize(
    "text", ["", " ", "hello", "  two  spaces\n\ttab ", "Grüße, 世界 🚀", "\x00\x7f\x85", "a" * 10_000]
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert ids == [4 + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text


def test_every_byte_has_an_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 260
    assert [tokenizer.decode([4 + byte]) for byte in range(128)] == [chr(byte) for byte in range(128)]


def test_no_bos_is_added_and_special_tokens_are_read(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(["<bos>a<eos>", "b"]) == [[1, 4 + ord("a"), 2], [4 + ord("b")]]
    assert tokenizer.encode_batch([]) == []


def test_special_and_unknown_ids_are_left_out_of_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1, 4 + ord("a"), 3, 0, 4 + ord("b"), 2, 99_999]) == "ab"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("raw", [b"\xff", b"a\xc3", b"\xe2\x82", b"\x80ok", b"\xf0\x9f\x9a!"])
def test_bytes_that_are_not_utf8_become_replacement_characters(tokenizer: Tokenizer, raw: bytes) -> None:
    text = tokenizer.decode([4 + byte for byte in raw])
    assert "\ufffd" in text
    assert text == raw.decode(errors="replace")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe"])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer(content)
    assert "\n" not in str(caught.value)


def test_the_post_processor_adds_and_truncation_and_padding_are_off() -> None:
    content = open_checkpoint("builtin:noise").tokenizer_json()
    assert content is not None
    document = json.loads(content)
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    tokenizer = Tokenizer(json.dumps(document).encode())
    a = 4 + ord("a")
    assert tokenizer.encode_batch(["aaaa", "a"]) == [[1, a, a, a, a], [1, a]]
