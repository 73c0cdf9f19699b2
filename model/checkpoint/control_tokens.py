"""Makes a copy of a tokenizer.json in which no text can spell a control token. It does not import torch.

The library finds every added token in any text, and some models also build one from ordinary text: Unigram and a BPE
with ignore_merges look for it in their vocabulary, and merges may lead to it. So in the copy each control token has
another name, a placeholder, and keeps its id. A caller writes placeholders where it wants control tokens. All other
text stays as it is, and nothing in it is special.

A placeholder is a marker and one more character, which stands for the token. The marker is drawn at random when the
copy is made, so no corpus can be written to contain it, and a text that contains it all the same gets a copy with
another marker. The ids depend on neither, because placeholders never reach the model.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from model.errors import CheckpointError

# The characters of a marker and those that stand for tokens are from two planes for private use. As they differ, no
# part of a text next to a placeholder can form another placeholder with it.
_MARKER_BASE, _TOKEN_BASE, _PLANE_SIZE = 0x100000, 0xF0000, 0xFFFE
_MARKER_LENGTH = 4
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Normalizers that leave every placeholder as it is, whatever stands beside it.
_KEEPS_PLACEHOLDERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip")


def control_tokens(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the contents of the added tokens of a parsed tokenizer.json that control the model, in the file's order.

    The others are text: white space, bytes (`<0x0A>`) of a model that falls back to bytes, and single characters that
    are not special, which some checkpoints add so that all bytes have an id.
    """
    bytes_are_text = bool(document["model"].get("byte_fallback"))
    contents: dict[str, None] = {}
    for token in document.get("added_tokens") or ():
        content = token["content"]
        is_text = (
            not content.replace("▁", " ").strip()
            or (len(content) == 1 and not token["special"])
            or (bytes_are_text and _BYTE_TOKEN.fullmatch(content) is not None)
        )
        if not is_text:
            contents[content] = None
    return tuple(contents)


def new_marker() -> str:
    """Return a random marker for placeholders, of characters for private use."""
    return "".join(chr(_MARKER_BASE + secrets.randbelow(_PLANE_SIZE)) for _ in range(_MARKER_LENGTH))


def placeholders(contents: Iterable[str], marker: str) -> dict[str, str]:
    """Return the placeholder of each control token. Raises CheckpointError if there are more than 65,534 tokens."""
    names = {content: marker + chr(_TOKEN_BASE + i) for i, content in enumerate(contents)}
    if len(names) > _PLANE_SIZE:
        raise CheckpointError(f"tokenizer.json has {len(names)} control tokens: at most {_PLANE_SIZE} are supported")
    return names


def renamed(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of a parsed tokenizer.json whose control tokens have the names in `names` (content -> placeholder).

    Its tokens have the ids that they have in the original: the library gives an added token the id of the model's
    vocabulary if it is there, and else the next free one, and the order and the places of all tokens are the same. The
    copy shares its unchanged parts with the original. Raises CheckpointError if a text cannot do without a token.
    """
    keep_normalized = _keeps_placeholders(document.get("normalizer"))
    added = [
        _renamed_token(token, names[token["content"]], keep_normalized) if token["content"] in names else token
        for token in document.get("added_tokens") or ()
    ]
    return {**document, "added_tokens": added, "model": _renamed_model(document["model"], names)}


def _renamed_token(token: Mapping[str, Any], name: str, keep_normalized: bool) -> dict[str, Any]:
    """Return an added token under its new name. lstrip and rstrip stay, as they act on the text beside the token.

    single_word goes: a placeholder is a token also beside a letter. If `normalized` is true, the library looks for the
    token in the normalised text; this stays if the placeholder survives there.
    """
    return {**token, "content": name, "single_word": False, "normalized": token["normalized"] and keep_normalized}


def _keeps_placeholders(normalizer: Mapping[str, Any] | None) -> bool:
    if normalizer is None or normalizer["type"] in _KEEPS_PLACEHOLDERS:
        return True
    if normalizer["type"] == "Sequence":
        return all(_keeps_placeholders(part) for part in normalizer["normalizers"])
    return normalizer["type"] == "Replace" and "String" in normalizer["pattern"]


def _renamed_model(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    changed = dict(model)
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score], the id is the place
        changed["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        changed["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    if isinstance(model.get("unk_token"), str):
        changed["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        if not model.get("byte_fallback"):
            _refuse_letters(vocab, names)
        prefix = len(model.get("continuing_subword_prefix") or "")
        changed["merges"] = [merge for merge in model["merges"] if not _touches(merge, prefix, names)]
    return changed


def _refuse_letters(vocab: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Raise CheckpointError if a control token is a letter of a BPE's alphabet: the model would drop it from texts."""
    for content in names:
        if len(content) == 1 and content in vocab:
            raise CheckpointError(
                f"tokenizer.json: the special token {content!r} is also a letter of the BPE's alphabet, so it cannot "
                "be told from text: take it out of added_tokens"
            )


def _touches(merge: str | list[str], prefix: int, names: Mapping[str, str]) -> bool:
    """Return whether a merge ("a b" or [a, b]) joins control tokens or makes one.

    prefix: the length of continuing_subword_prefix, which the second part loses in the merge.
    """
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in names or second in names or first + second[prefix:] in names
