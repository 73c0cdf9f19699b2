"""Converts text to token ids and back, with the `tokenizers` library and a checkpoint's tokenizer.json.

It does not import torch.
"""

import os
from collections.abc import Sequence

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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises a bare Exception if it cannot parse the bytes
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(f"tokenizer.json cannot be read: {text}") from error
        # A tokenizer.json may set truncation or padding, left from training. No prompt may be cut or padded silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """The number of ids in tokenizer.json, special tokens included. The model's vocab_size may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with the special tokens that the post-processor of tokenizer.json adds.

        Nothing is cut or padded.
        """
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens.

        Bytes that are not UTF-8 become U+FFFD; unknown ids are left out.
        """
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
