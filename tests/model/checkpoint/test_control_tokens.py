"""Tests that encode_prompts makes control tokens of the given ranges alone, and is else as the original tokenizer."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers

from model.checkpoint.control_tokens import control_tokens, new_marker, placeholders, renamed
from model.checkpoint.tokenizer import Tokenizer
from model.errors import CheckpointError
from tests.model.checkpoint.small_tokenizers import (
    CONTROL,
    LOSSLESS,
    MAKERS,
    added,
    builtin,
    byte_bpe,
    random_pieces,
    tokenizer_json,
    weak_markers,
)

TEXTS = 150  # random texts for each tokenizer; a longer run finds the same
Ranges = list[tuple[int, int]]


class Tokens:
    """A tokenizer under test beside the library's own, and the ids of its control tokens."""

    def __init__(self, content: bytes) -> None:
        self.tested = Tokenizer(content)
        self.original = tokenizers.Tokenizer.from_buffer(content)
        self.contents = self.tested.control_tokens
        self.ids: dict[str, int | None] = dict(
            zip(self.contents, map(self.original.token_to_id, self.contents), strict=True)
        )
        unknown = json.loads(content)["model"].get("unk_token") or "<unk>"
        self.control_ids = {token_id for content, token_id in self.ids.items() if content != unknown}
        """The ids that no text may yield. The id of an unknown piece is not among them."""
        empty = self.original.encode("a")
        masked = [i for i, added_id in enumerate(empty.special_tokens_mask) if not added_id]
        self.leading, self.trailing = empty.ids[: masked[0]], empty.ids[masked[-1] + 1 :]

    def encode(self, prompts: list[tuple[str, Ranges]]) -> list[list[int]]:
        """Return the ids of prompts, each encoded by itself, so that only its own text must do without the marker."""
        return [self.tested.encode_prompts([text], [ranges])[0] for text, ranges in prompts]

    def controls(self, ids: Sequence[int | None]) -> list[int | None]:
        """Return the ids that no text may yield."""
        return [token_id for token_id in ids if token_id in self.control_ids]

    def parsed(self, text: str) -> Ranges | None:
        """Return where the original finds control tokens in a text; None if one is not spelled as it is named."""
        encoding = self.original.encode(text, add_special_tokens=False)
        ranges: Ranges = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelled = text[start:end].strip()
            if self.ids.get(spelled) == token_id:
                start += text[start:end].index(spelled)
                ranges.append((start, start + len(spelled)))
            elif token_id in self.control_ids:
                return None
        return ranges


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a tokenizer. The markers are drawn from few characters, which the random texts contain too."""
    monkeypatch.setattr("model.checkpoint.tokenizer.new_marker", weak_markers(random.Random(0)))
    return str(request.param)


def chosen(rng: random.Random, tokens: Tokens) -> tuple[str, Ranges]:
    """Return a random text and ranges for some of the control tokens in it."""
    text, ranges = "", list[tuple[int, int]]()
    for piece in random_pieces(rng, tokens.contents):
        if piece in tokens.contents and rng.random() < 0.5:
            ranges.append((len(text), len(text) + len(piece)))
        text += piece
    return text, ranges


@pytest.fixture
def tokens(name: str) -> Tokens:
    return Tokens(tokenizer_json(name))


def test_no_text_makes_a_control_token(name: str, tokens: Tokens) -> None:
    """The control tokens of a prompt are those of its ranges, in order, and those of the post-processor."""
    check_only_ranges(tokens, random.Random(name), TEXTS)


def check_only_ranges(tokens: Tokens, rng: random.Random, count: int) -> None:
    prompts = [chosen(rng, tokens) for _ in range(count)]
    assert sum(len(ranges) for _, ranges in prompts) > count / 2
    encoded = tokens.encode(prompts)
    leading, trailing = tokens.controls(tokens.leading), tokens.controls(tokens.trailing)
    for (text, ranges), ids in zip(prompts, encoded, strict=True):
        own = tokens.controls([tokens.ids[text[start:end]] for start, end in ranges])
        expected = [leading + own + trailing]
        if leading and own[: len(leading)] == leading:  # they stand once if nothing is before them
            expected.append(own + trailing)
        assert tokens.controls(ids) in expected, (text, ranges)


def test_ranges_where_the_original_finds_tokens_give_its_ids(name: str, tokens: Tokens) -> None:
    """This holds for texts without control tokens too, which have no ranges."""
    check_as_the_original(tokens, random.Random(name), TEXTS)


def check_as_the_original(tokens: Tokens, rng: random.Random, count: int) -> None:
    drawn = ["".join(random_pieces(rng, tokens.contents)) for _ in range(count)]
    prompts = [(text, ranges) for text in drawn if (ranges := tokens.parsed(text)) is not None]
    assert len(prompts) > count / 2
    texts = [text for text, _ in prompts]
    encoded = tokens.encode(prompts)
    assert sum(not ranges for _, ranges in prompts) > count / 50
    for text, ids, once, twice in zip(
        texts, encoded, tokens.tested.encode_batch(texts, bos_once=True), tokens.tested.encode_batch(texts), strict=True
    ):
        assert ids == once, text
        added = len(tokens.leading)
        assert twice == once or (twice[added:] == once and once[:added] == tokens.leading), text


@pytest.mark.parametrize("name", LOSSLESS, indirect=True)
def test_the_ids_of_a_lossless_tokenizer_decode_to_the_text(name: str, tokens: Tokens) -> None:
    check_lossless(tokens, random.Random(name), TEXTS)


def check_lossless(tokens: Tokens, rng: random.Random, count: int) -> None:
    prompts = [chosen(rng, tokens) for _ in range(count)]
    encoded = tokens.encode(prompts)
    for (text, _), ids in zip(prompts, encoded, strict=True):
        assert tokens.original.decode(ids, skip_special_tokens=False) == text


# Single cases


def encode(name: str, text: str, *ranges: tuple[int, int]) -> list[str | None]:
    content = tokenizer_json(name)
    original = tokenizers.Tokenizer.from_buffer(content)
    (ids,) = Tokenizer(content).encode_prompts([text], [list(ranges)])
    return [original.id_to_token(token_id) for token_id in ids]


def test_a_cell_cannot_end_a_prompt() -> None:
    assert encode("tiny", "<eos>", (0, 5)) == ["<eos>"]
    assert "<eos>" not in encode("tiny", "<eos>")
    assert "".join(map(str, encode("tiny", "<eos>"))) == "<eos>"
    assert encode("tiny", "<eos><eos>", (5, 10))[-1] == "<eos>"
    assert encode("tiny", "<eos><eos>", (5, 10)).count("<eos>") == 1


@pytest.mark.parametrize(("name", "text"), [("t5", "<eos>"), ("llama3", "<eos>"), ("merges_to_tokens", "<eos>>")])
def test_the_models_vocabulary_makes_no_control_token(name: str, text: str) -> None:
    """The token is only text for the added tokens of the original, and its model makes the token all the same."""
    document = json.loads(tokenizer_json(name))
    document["added_tokens"] = []
    unaware = tokenizers.Tokenizer.from_str(json.dumps(document))
    assert "<eos>" in "".join(unaware.encode(text).tokens)
    assert unaware.token_to_id(text) in unaware.encode(text).ids
    assert text not in encode(name, text)


def test_a_token_for_single_words_is_one_beside_letters_too() -> None:
    assert encode("flags", "a<word>b", (1, 7)) == ["a", "<word>", "b"]


def test_tokens_take_the_white_space_beside_them() -> None:
    assert encode("flags", "a <eos> b", (2, 7)) == ["a", "<eos>", "Ġb"]
    assert encode("flags", "a <|im|>end \n b", (2, 11)) == ["a", "<|im|>end", "b"]
    assert encode("flags", "a <eos> b") != ["a", "<eos>", "Ġb"]


def test_the_leading_token_stands_once() -> None:
    bos = "<s>"
    assert encode("llama3", "a")[0] == bos
    assert encode("llama3", "<s>a", (0, 3)) == [bos, "a"]
    assert encode("llama3", "<s>a").count(bos) == 1
    assert encode("llama3", "<s><s>a", (0, 3), (3, 6)) == [bos, bos, "a"]
    assert encode("bert", "[CLS]", (0, 5)) == ["[CLS]", "[SEP]"]
    assert encode("bert", "") == ["[CLS]", "[SEP]"]


def test_a_text_without_ranges_is_as_in_encode_batch_also_if_its_model_makes_the_leading_token() -> None:
    document = json.loads(tokenizer_json("word_level"))
    document["added_tokens"] = []  # <s> is then an ordinary word
    tokenizer = Tokenizer(json.dumps(document).encode())
    (ids,) = tokenizer.encode_prompts(["<s> the"], [[]])
    assert ids == tokenizer.encode_batch(["<s> the"])[0]
    assert ids[0] == ids[1]


def test_a_range_is_a_token_where_the_original_would_not_find_it() -> None:
    """Prepend changes tokens that are found in normalised text, so the original finds <eos> only after a space."""
    document = json.loads(tokenizer_json("llama2"))
    for token in document["added_tokens"]:
        token["normalized"] = True
    tokenizer = Tokenizer(json.dumps(document).encode())
    (eos,) = (token["id"] for token in document["added_tokens"] if token["content"] == "<eos>")
    assert eos not in tokenizer.encode_batch(["a<eos>b"])[0]
    assert tokenizer.encode_prompts(["a<eos>b<eos>"], [[(1, 6)]])[0].count(eos) == 1


def test_encode_batch_adds_the_leading_token_once_if_it_is_asked_to() -> None:
    tokenizer = Tokenizer(tokenizer_json("llama3"))
    ((bos, a),) = tokenizer.encode_batch(["a"])
    texts = ["a", "<s>a", "<s><s>a", "<s>", ""]
    assert tokenizer.encode_batch(texts) == [[bos, a], [bos, bos, a], [bos, bos, bos, a], [bos, bos], [bos]]
    assert tokenizer.encode_batch(texts, bos_once=True) == [[bos, a], [bos, a], [bos, bos, a], [bos], [bos]]


@pytest.mark.parametrize("post", [None, "same"])
def test_an_empty_text_keeps_what_the_post_processor_adds(post: str | None) -> None:
    """A token that stands in front and at the end is not a leading token twice."""
    document = builtin("noise")
    if post:
        document["post_processor"] = {"type": "BertProcessing", "sep": ["<bos>", 1], "cls": ["<bos>", 1]}
    tokenizer = Tokenizer(json.dumps(document).encode())
    assert tokenizer.encode_batch([""], bos_once=True) == [[1, 1] if post else []]
    assert tokenizer.encode_batch(["<bos>"], bos_once=True) == [[1, 1] if post else [1]]


@pytest.mark.parametrize(
    "ranges",
    [[(0, 4)], [(0, 6)], [(1, 5)], [(0, 0)], [(-14, 5)], [(0, 5), (0, 5)], [(9, 14), (0, 5)], [(9, 15)], [(20, 25)]],
)
def test_ranges_that_spell_no_control_token_are_refused(ranges: Ranges) -> None:
    tokenizer = Tokenizer(tokenizer_json("tiny"))
    with pytest.raises(ValueError, match="a range must spell a control token") as caught:
        tokenizer.encode_prompts(["<eos> b <<eos>"], [ranges])
    assert "\n" not in str(caught.value)


def test_each_text_needs_its_ranges() -> None:
    tokenizer = Tokenizer(tokenizer_json("tiny"))
    assert tokenizer.encode_prompts([], []) == []
    with pytest.raises(ValueError, match="argument"):
        tokenizer.encode_prompts(["a", "b"], [[]])


def test_a_text_with_the_marker_gets_another_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids are the same whatever the marker is."""
    bad, good = "\U00100000\U00100001\U00100000", "\U00100001\U00100001\U00100000"
    markers = [good, bad, bad]
    monkeypatch.setattr("model.checkpoint.tokenizer.new_marker", markers.pop)
    tokenizer = Tokenizer(tokenizer_json("t5"))
    text = "<eos>" + "".join(bad + chr(0xF0000 + i) for i in range(9))
    texts, ranges = ["a", text], [[], [(0, 5)]]
    ids = tokenizer.encode_prompts(texts, ranges)
    assert not markers
    monkeypatch.undo()
    assert Tokenizer(tokenizer_json("t5")).encode_prompts(texts, ranges) == ids
    assert ids == Tokenizer(tokenizer_json("t5")).encode_batch(texts)


def test_the_copy_is_made_once_and_only_if_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    markers = [new_marker()]
    monkeypatch.setattr("model.checkpoint.tokenizer.new_marker", markers.pop)
    tokenizer = Tokenizer(tokenizer_json("noise"))
    tokenizer.encode_batch(["<eos>"])
    assert markers
    tokenizer.encode_prompts(["a"], [[]])
    tokenizer.encode_prompts(["<eos>"], [[(0, 5)]])
    assert not markers


# Which tokens are control tokens, and how the copy is made


def test_control_tokens_are_all_added_tokens_that_are_not_text() -> None:
    assert Tokenizer(tokenizer_json("tiny")).control_tokens == ("<pad>", "<bos>", "<eos>", "<mask>")
    flags = Tokenizer(tokenizer_json("flags")).control_tokens
    assert flags == ("<eos>", "<|im|>", "<|im|>end", "<word>", "<s>", "<eos>>", "<\uff5cé\uff5c>")
    document = json.loads(tokenizer_json("llama2"))
    assert {"<0x0A>", "▁▁"} <= {token["content"] for token in document["added_tokens"]}
    assert control_tokens(document) == ("<unk>", *CONTROL)
    document["model"]["byte_fallback"] = False
    assert "<0x0A>" in control_tokens(document)
    document["added_tokens"] = [*reversed(document["added_tokens"]), *document["added_tokens"]]
    assert control_tokens(document)[:2] == ("<\uff5cé\uff5c>", "<|im|>end")
    assert len(set(control_tokens(document))) == len(control_tokens(document))


def test_the_original_document_is_not_changed() -> None:
    document = json.loads(tokenizer_json("merges_to_tokens"))
    before = json.dumps(document)
    renamed(document, placeholders(control_tokens(document), new_marker()))
    assert json.dumps(document) == before


def test_merges_with_a_prefix_that_make_a_token_are_left_out() -> None:
    model: dict[str, Any] = {"vocab": {"ab": 0, "abc": 1}, "continuing_subword_prefix": "##"}
    model["merges"] = [["a", "##b"], ["ab", "##c"], ["c", "##ab"], ["b", "##a"], "a ##b", "a ##c"]
    document = {"normalizer": None, "model": model}
    assert renamed(document, {"ab": "X"})["model"]["merges"] == [["c", "##ab"], ["b", "##a"], "a ##c"]


def test_the_unknown_token_keeps_its_use() -> None:
    """A word that the model does not know is an unknown token; the text <unk> is such a word."""
    assert encode("word_level", "zzz <unk>") == ["<s>", "<unk>", "<unk>"]
    assert encode("word_level", "<unk>the", (0, 5)) == ["<s>", "<unk>", "the"]


def test_markers_are_drawn_anew() -> None:
    markers = {new_marker() for _ in range(50)}
    assert len(markers) == 50
    assert {len(marker) for marker in markers} == {4}
    names = placeholders(["a", "b"], "")
    assert {char >= "\U00100000" for marker in markers for char in marker} == {True}
    assert {char >= "\U00100000" for char in names.values()} == {False}


def test_more_control_tokens_than_there_are_placeholders() -> None:
    assert len(set(placeholders(map(str, range(65_534)), "M").values())) == 65_534
    with pytest.raises(CheckpointError, match="65535 control tokens: at most 65534"):
        placeholders(map(str, range(65_535)), "M")


def test_a_letter_of_the_alphabet_cannot_be_a_control_token() -> None:
    document = byte_bpe(in_vocab=False, tokens=[added("!")])
    with pytest.raises(CheckpointError, match="the special token '!' is also a letter of the BPE's alphabet"):
        Tokenizer(json.dumps(document).encode()).encode_prompts(["a"], [[]])


def test_a_copy_with_another_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_model(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
        return {**renamed(document, names), "model": document["model"]}

    monkeypatch.setattr("model.checkpoint.tokenizer.renamed", without_model)
    with pytest.raises(CheckpointError, match="the control token '<pad>' has the id 0, but 260 in the copy") as caught:
        Tokenizer(tokenizer_json("noise")).encode_prompts(["a"], [[]])
    assert "\n" not in str(caught.value)
