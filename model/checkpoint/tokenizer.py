"""Text to token ids and back, with the `tokenizers` library and a checkpoint's tokenizer.json. Free of torch."""

import os
from collections.abc import Sequence

from model.errors import CheckpointError

# The library warns, and then runs on one thread anyway, when a process that used its thread pool forks. Ray and
# multiprocessing may fork after this process has tokenised, and workers already run one a core, so its threads are off
# unless the user asks for them. The variable is read at each batch, so it is early enough to set it here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers


class Tokenizer:
    """The tokenizer of one checkpoint. Not frozen by the library, but never changed after it is made."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises CheckpointError where the bytes are no tokenizer.json."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(f"tokenizer.json cannot be read: {text}") from error
        # A tokenizer.json may carry truncation or padding from its training; no prompt may be cut or padded in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Ids that tokenizer.json knows, special tokens included; at most the model's vocab_size."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that the post-processor of tokenizer.json adds."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids without special tokens. Bytes that are not UTF-8 become U+FFFD; unknown ids vanish."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
