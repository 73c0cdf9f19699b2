"""Converts text to token ids and back, with the `tokenizers` library and a checkpoint's tokenizer.json.

It does not import torch.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile

from model.checkpoint.control_tokens import control_tokens, new_marker, placeholders, renamed
from model.errors import CheckpointError

# If a process forks after it has used the library's thread pool, the library warns and then runs on one thread. Ray and
# multiprocessing may fork after this process has tokenised, and there is already one worker for each core. So the
# library's threads are off unless the user turns them on. It reads the variable at each batch, so this is early enough.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers


class Tokenizer:
    """The tokenizer of one checkpoint: text to token ids and back. Nothing changes it after it is created."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Take the content of tokenizer.json. Raises CheckpointError if the bytes are not a tokenizer.json."""
        self._json = tokenizer_json
        self._tokenizer = _load(tokenizer_json)
        self._copy: _RenamedCopy | None = None  # made at the first use: it takes longer than the original

    @property
    def vocab_size(self) -> int:
        """The number of ids in tokenizer.json, special tokens included. The model's vocab_size may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts of the added tokens that control the model, in the order of tokenizer.json, each once.

        Added tokens that are white space or other text (see control_tokens.py) are not among them.
        """
        return control_tokens(json.loads(self._json))

    def encode_batch(self, texts: Sequence[str], *, bos_once: bool = False) -> list[list[int]]:
        """Return the ids of each text, with the special tokens that the post-processor of tokenizer.json adds.

        A text that spells an added token yields it. With bos_once, the special tokens that the post-processor puts in
        front are not added to a text that begins with them. Nothing is cut or padded.
        """
        rows: list[list[int]] = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        return [self._leading_once(ids) for ids in rows] if bos_once else rows

    def encode_prompts(self, texts: Sequence[str], control: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
        """Return the ids of each text, in which only the given ranges are control tokens.

        control: for each text, ranges (start, end) of characters, sorted and apart, each of which spells one of
        control_tokens. Everything else is text, whatever it spells. The post-processor adds its special tokens, those
        in front only if the text does not begin with them. Nothing is cut or padded. Raises ValueError if a range does
        not spell a control token, and CheckpointError if this tokenizer.json cannot tell text from control tokens.
        """
        copy = self._copy
        while copy is None or any(copy.marker in text for text in texts):
            self._copy = copy = _RenamedCopy(self._json, self._tokenizer)
        marked = [_mark(text, ranges, copy.names) for text, ranges in zip(texts, control, strict=True)]
        rows: list[list[int]] = [encoding.ids for encoding in copy.tokenizer.encode_batch_fast(marked)]
        return [self._leading_once(ids) if ranges else ids for ids, ranges in zip(rows, control, strict=True)]

    def _leading_once(self, ids: list[int]) -> list[int]:
        """Return the ids without the leading tokens of the post-processor if the text itself begins with them."""
        leading, added = self._special
        count = len(leading)
        of_text = len(ids) - added
        return ids[count:] if count <= of_text and ids[count : 2 * count] == leading else ids

    @cached_property
    def _special(self) -> tuple[list[int], int]:
        """The special tokens that the post-processor puts in front of a text, and the number of all that it adds."""
        added = self._tokenizer.num_special_tokens_to_add(False)
        contents = (token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        for text in ("a", *contents):  # the first text that has ids of its own shows where they begin
            encoding = self._tokenizer.encode(text)
            if not all(encoding.special_tokens_mask):
                pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
                return [token_id for token_id, _ in takewhile(lambda pair: pair[1], pairs)], added
        return [], added

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens.

        Bytes that are not UTF-8 become U+FFFD; unknown ids are left out.
        """
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class _RenamedCopy:
    """A copy of a tokenizer in which the control tokens have placeholders for names; see control_tokens.py."""

    def __init__(self, tokenizer_json: bytes, original: tokenizers.Tokenizer) -> None:
        document = json.loads(tokenizer_json)
        self.marker = new_marker()
        self.names: Mapping[str, str] = placeholders(control_tokens(document), self.marker)
        self.tokenizer = _load(json.dumps(renamed(document, self.names), ensure_ascii=False).encode())
        for content, name in self.names.items():
            expected, found = original.token_to_id(content), self.tokenizer.token_to_id(name)
            if found != expected:
                raise CheckpointError(
                    f"tokenizer.json: the control token {content!r} has the id {expected}, but {found} in the copy in "
                    "which no text spells a control token: no template can be used with this tokenizer"
                )


def _load(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception if it cannot parse the bytes
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"tokenizer.json cannot be read: {text}") from error
    # A tokenizer.json may set truncation or padding, left from training. No prompt may be cut or padded silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _mark(text: str, ranges: Sequence[tuple[int, int]], names: Mapping[str, str]) -> str:
    """Return the text with placeholders in place of the ranges. Raises ValueError if one spells no control token."""
    pieces, at = list[str](), 0
    for start, end in ranges:
        name = names.get(text[start:end])
        if name is None or not at <= start <= end <= len(text):
            raise ValueError(
                f"({start}, {end}) in a text of {len(text)} characters spells {text[start:end][:50]!r}: a range must "
                f"spell a control token and begin at {at} or later"
            )
        pieces += [text[at:start], name]
        at = end
    return "".join([*pieces, text[at:]])
