"""Builds small tokenizers of the usual kinds with the tokenizers library, and random texts that are hard for them."""

import functools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from model.checkpoint.reader import open_checkpoint

Document = dict[str, Any]
CONTROL = ("<s>", "<eos>", "<eos>>", "<|im|>", "<|im|>end", "<\uff5cé\uff5c>")
"""Control tokens of every tokenizer but BERT's and the built-in ones; some are prefixes of others."""
CORPUS = (
    "a eos b end im s <s> <eos> < | > the rain in Spain, 12 the end",
    "<eos> <eos> <eos>> <|im|> <|im|>end a<eos>b é è 世界 im end <s> <s>",
) * 3


def added(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, **{"special": True, "normalized": False, **flags})


def bos_first(tokenizer: Tokenizer) -> processors.PostProcessor:
    return processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])


def byte_bpe(*, in_vocab: bool, regex: bool = True, bos: bool = False, tokens: Sequence[AddedToken] = ()) -> Document:
    """A byte-level BPE as in GPT-2. Without the regex, merges of the model build control tokens from text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CONTROL) if in_vocab else [],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    given = {token.content for token in tokens}
    tokenizer.add_tokens([*tokens, *(added(content) for content in CONTROL if content not in given)])
    if bos:
        tokenizer.post_processor = bos_first(tokenizer)
    return document_of(tokenizer)


def document_of(tokenizer: Tokenizer) -> Document:
    document: Document = json.loads(tokenizer.to_str())
    return document


def gpt2() -> Document:
    return byte_bpe(in_vocab=False)


def merges_to_tokens() -> Document:
    """Merges lead to control tokens and on from them, and are written in the older form, "a b"."""
    document = byte_bpe(in_vocab=True, regex=False)
    model = document["model"]
    path = [("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", ">"), ("<eos>", ">"), ("<eos>", "a")]
    for first, second in path:
        model["vocab"].setdefault(first + second, len(model["vocab"]))
    model["merges"] = [" ".join(merge) for merge in [*path, *map(tuple, model["merges"])]]
    return document


def llama3() -> Document:
    """ignore_merges: the model looks for each whole word, so also for a control token, in its vocabulary."""
    document = byte_bpe(in_vocab=True, regex=False, bos=True)
    document["model"]["ignore_merges"] = True
    return document


def flags() -> Document:
    """Tokens that are not special, that take the white space beside them or stand alone, and runs of white space."""
    tokens = [
        added("<eos>", special=False, lstrip=True),
        added("<|im|>", rstrip=True, normalized=True),
        added("<|im|>end", special=False, lstrip=True, rstrip=True, normalized=True),
        added("   ", special=False, normalized=True),
        added("  ", special=False),
        added("<word>", single_word=True),
        added("ö", special=False),
    ]
    return byte_bpe(in_vocab=False, tokens=tokens)


def normalized() -> Document:
    """Tokens that are found in the normalised text."""
    tokens = [added(content, normalized=True, lstrip=content == "<eos>") for content in CONTROL]
    document = byte_bpe(in_vocab=True, tokens=tokens)
    for token in document["added_tokens"]:
        token["normalized"] = True
    parts = [normalizers.Strip(), normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace("q", "  ")]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.normalizer = normalizers.Sequence(parts)
    return document_of(tokenizer)


def llama2() -> Document:
    """A BPE of characters that falls back to bytes. Spaces become ▁ in the normalizer; one byte is an added token."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = spaces
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        min_frequency=2,
        show_progress=False,
        special_tokens=["<unk>", *CONTROL[:3], *byte_tokens],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    document = document_of(tokenizer)
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in byte_tokens[11:]]
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in byte_tokens[:10]]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_tokens([added(content, rstrip=content == "<|im|>") for content in CONTROL])
    tokenizer.add_tokens([added("▁▁", special=False)])
    tokenizer.post_processor = bos_first(tokenizer)
    return document_of(tokenizer)


def t5() -> Document:
    """A Unigram with Metaspace, whose vocabulary has the control tokens as pieces, and </s> at the end of a text."""
    letters = sorted(set("".join(CORPUS)) - {" "})
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((content, -1.0) for content in CONTROL), ("▁", -3.0)]
    pieces += [(letter, -5.0 - i / 10) for i, letter in enumerate(letters)] + [("▁the", -6.0), ("▁eos", -6.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_tokens([added("<unk>"), added("</s>"), *(added(content) for content in CONTROL)])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return document_of(tokenizer)


def bert() -> Document:
    """A lowercasing WordPiece. Its normalizer removes characters for private use, and [MASK] is found behind it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.BertNormalizer(lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, min_frequency=1, show_progress=False, special_tokens=special, initial_alphabet=["[", "]"]
    )
    tokenizer.train_from_iterator([text + " cls sep [ ]" for text in CORPUS], trainer)
    tokenizer.add_tokens([added("[MASK]", lstrip=True, normalized=True)])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return document_of(tokenizer)


def word_level() -> Document:
    words = ["<unk>", *CONTROL, *sorted({word for text in CORPUS for word in text.split()} - {*CONTROL})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([added("<unk>"), *(added(content) for content in CONTROL)])
    tokenizer.post_processor = bos_first(tokenizer)
    return document_of(tokenizer)


def builtin(name: str) -> Document:
    content = open_checkpoint(f"builtin:{name}").tokenizer_json()
    assert content is not None
    document: Document = json.loads(content)
    return document


MAKERS: dict[str, Callable[[], Document]] = {
    maker.__name__: maker for maker in (gpt2, merges_to_tokens, llama3, flags, normalized, llama2, t5, bert, word_level)
}
MAKERS |= {name: functools.partial(builtin, name) for name in ("tiny", "noise")}
LOSSLESS = ("gpt2", "merges_to_tokens", "tiny", "noise")
"""Tokenizers without a normalizer and a post-processor whose tokens take no white space: the ids say all of a text."""


@functools.cache
def tokenizer_json(name: str) -> bytes:
    return json.dumps(MAKERS[name](), ensure_ascii=False).encode()


PRIVATE = [chr(0x100000 + i) for i in range(2)] + [chr(0xF0000 + i) for i in range(6)]
"""Characters of the markers that a test draws (see `weak_markers`), and those that stand for tokens."""
LETTERS = [
    *"aeos<>|[]imCLSendcls12 .é世",
    " ",
    "  ",
    "   ",
    "\n",
    "\t",
    "▁",
    "ö",
    "q",
    "\u0301",
    "\u0338",
    "\ufb01",
    "<0x0A>",
]


def weak_markers(rng: random.Random) -> Callable[[], str]:
    """Return a function that draws a marker of three characters of PRIVATE. Random texts often contain it in part, and
    sometimes the whole."""
    return lambda: "".join(rng.choices(PRIVATE[:2], k=3))


def random_pieces(rng: random.Random, contents: Sequence[str], *, private: bool = True) -> list[str]:
    """Return pieces of a text: whole control tokens, parts of them, characters for private use, blanks and letters."""
    pieces = []
    for _ in range(rng.randrange(12)):
        kind = rng.random()
        content = rng.choice(contents)
        if kind < 0.3:
            pieces.append(content)
        elif kind < 0.5:
            start = rng.randrange(len(content))
            pieces.append(content[start : rng.randrange(start, len(content)) + 1])
        elif kind < 0.7 and private:
            pieces.append("".join(rng.choices(PRIVATE, k=rng.randrange(1, 4))))
        else:
            pieces.append("".join(rng.choices(LETTERS, k=rng.randrange(1, 5))))
    return pieces
