"""Packs examples for training, as documents of token ids, into rows of a fixed number of chunks.

Here a row is a row of a training batch, which holds several documents: an example's prompt and answer each.
model.builtin.trainable describes how a document is placed in its row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.builtin.bpe import EOS, PAD
from model.builtin.recipe import Recipe
from model.builtin.tasks import Example, examples
from model.builtin.trainable import CHUNK

ROW_CHUNKS = 18  # chunks of CHUNK tokens per row
OPEN_ROWS = 64  # limit of the rows that have room left and wait for a document that fits
PROMPT_WEIGHT = 0.1
"""Weight of a prompt's tokens in the context tower's loss. It is low because most of a prompt is random; it is not 0
because the solved examples in a prompt can be predicted."""


EPOCH_ROWS = 20_000  # rows that are made at once, for the steps of one epoch; each epoch has other rows

Batch = dict[str, Tensor]
"""The B rows of a step as tensors: the fields of Rows, and after `mask_blocks` also chunk, t and masked."""


@dataclass(frozen=True, slots=True)
class Rows:
    """R training rows of T = ROW_CHUNKS * CHUNK tokens, each packed with one or more documents.

    The fields hold the token ids, which tokens and chunks are real, and the weights of the loss. No token is masked
    yet: see mask_blocks. In unused chunks `document` is the number of documents in the row.
    """

    ids: np.ndarray  # (R, T) int64
    real: np.ndarray  # (R, T) bool: False at padding in front of a prompt and in unused chunks
    document: np.ndarray  # (R, ROW_CHUNKS) int64: number of the chunk's document within its row
    weight: np.ndarray  # (R, T) float32: weight in the loss of predicting the next token
    is_block: np.ndarray  # (R, ROW_CHUNKS) bool: True if the chunk belongs to a completion
    live: np.ndarray  # (R, T) bool: True in a document up to and including its end of text; False at padding


@dataclass(frozen=True, slots=True)
class _Document:
    """The token ids of an example; `answer` includes the end of text. The properties count its chunks in a row."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def prompt_chunks(self) -> int:
        return -(-len(self.prompt) // CHUNK)

    @property
    def chunks(self) -> int:
        return self.prompt_chunks - (-len(self.answer) // CHUNK)

    @property
    def fits(self) -> bool:
        return self.chunks <= ROW_CHUNKS


def held_out_examples(tokenizer: Tokenizer, seed: int, count: int) -> list[Example]:
    """Return `count` held-out examples for evaluation. Each fits into a row, as the examples for training do."""
    fitting = (example for example, document in _documents(tokenizer, examples(seed, held_out=True)) if document.fits)
    return list(islice(fitting, count))


def training_rows(tokenizer: Tokenizer, seed: int, count: int, shares: Mapping[str, float] | None = None) -> Rows:
    """Return `count` rows of training examples; the same seed gives the same rows.

    shares: shares of some tasks that replace those in TASKS. An example that does not fit into a row is left out.
    """
    source = examples(seed, held_out=False, shares=shares)
    documents = (document for _, document in _documents(tokenizer, source) if document.fits)
    rows = list(islice(_pack(documents), count))
    made = Rows(
        np.full((count, ROW_CHUNKS * CHUNK), PAD, dtype=np.int64),
        np.zeros((count, ROW_CHUNKS * CHUNK), dtype=bool),
        np.zeros((count, ROW_CHUNKS), dtype=np.int64),
        np.zeros((count, ROW_CHUNKS * CHUNK), dtype=np.float32),
        np.zeros((count, ROW_CHUNKS), dtype=bool),
        np.zeros((count, ROW_CHUNKS * CHUNK), dtype=bool),
    )
    for row, held in enumerate(rows):
        at = 0
        for number, document in enumerate(held):
            _write(made, row, at, number, document)
            at += document.chunks
        made.document[row, at:] = len(held)
    return made


class Corpus:
    """The training batches of one phase. A batch depends on the seed, the shares and the step number alone."""

    def __init__(self, tokenizer: Tokenizer, seed: int, shares: Mapping[str, float]) -> None:
        self._tokenizer, self._seed, self._shares = tokenizer, seed, shares
        self._epoch = -1
        self._rows: Rows | None = None

    def batch(self, step: int, rows: int) -> Batch:
        """Return the batch of step number `step`, which has `rows` rows: the fields of Rows as tensors on the CPU."""
        per_epoch = EPOCH_ROWS // rows
        epoch, place = divmod(step, per_epoch)
        if epoch != self._epoch or self._rows is None:
            self._epoch, self._rows = (
                epoch,
                training_rows(self._tokenizer, self._seed + epoch, EPOCH_ROWS, self._shares),
            )
        some = slice(place * rows, (place + 1) * rows)
        return {name: torch.from_numpy(getattr(self._rows, name)[some]) for name in Rows.__slots__}


def mask_blocks(batch: Batch, recipe: Recipe, seed: int) -> Batch:
    """Draw K = recipe.blocks blocks of completions in each row, and the tokens of them that are masked.

    Returns the batch with three more fields: chunk (B, K), the chunk in the row of each block; t (B, K), its masked
    fraction; masked (B, K, Q) bool, the tokens to mask. The ids stay as they are. A row with fewer than K blocks gives
    some of them more than once, with different masks.
    """
    rng = np.random.default_rng(seed)
    is_block = batch["is_block"].numpy()
    order = np.where(is_block, rng.random(is_block.shape), 2.0).argsort(axis=1)  # blocks first, in random order
    turn = np.arange(recipe.blocks)[None] % is_block.sum(axis=1)[:, None]
    chunk = np.take_along_axis(order, turn, axis=1)
    count = rng.integers(1, CHUNK + 1, chunk.shape)
    count = np.where(rng.random(chunk.shape) < recipe.all_masked, CHUNK, count)
    masked = rng.random((*chunk.shape, CHUNK)).argsort(axis=-1).argsort(axis=-1) < count[..., None]
    tail = np.arange(CHUNK) >= CHUNK - count[..., None]
    masked = np.where(rng.random((*chunk.shape, 1)) < recipe.tail_masked, tail, masked)
    drawn = {"chunk": chunk, "t": (count / CHUNK).astype(np.float32), "masked": masked}
    return batch | {name: torch.from_numpy(value) for name, value in drawn.items()}


def _write(rows: Rows, row: int, chunk: int, number: int, document: _Document) -> None:
    """Write the document, number `number` of the row, into `rows` from chunk `chunk` of the row on."""
    answer = (chunk + document.prompt_chunks) * CHUNK  # start of the answer
    begin, last, end = answer - len(document.prompt), answer + len(document.answer), (chunk + document.chunks) * CHUNK
    rows.ids[row, begin:answer], rows.ids[row, answer:last] = document.prompt, document.answer
    rows.ids[row, last:end] = EOS  # the denoiser must learn to fill the rest of the last block with EOS
    rows.real[row, begin:end] = True
    rows.live[row, begin:last] = True
    rows.document[row, chunk : chunk + document.chunks] = number
    rows.weight[row, begin : answer - 1] = PROMPT_WEIGHT
    rows.weight[row, answer - 1 : last - 1] = 1.0
    rows.is_block[row, answer // CHUNK : chunk + document.chunks] = True


def _documents(tokenizer: Tokenizer, source: Iterator[Example]) -> Iterator[tuple[Example, _Document]]:
    """Yield each example of the endless `source` with its token ids."""
    while True:
        batch = list(islice(source, 1000))
        prompts = tokenizer.encode_batch_fast([example.prompt for example in batch])
        answers = tokenizer.encode_batch_fast([example.answer for example in batch])
        for example, prompt, answer in zip(batch, prompts, answers, strict=True):
            yield example, _Document(prompt.ids, [*answer.ids, EOS])


def _pack(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Yield rows of documents. Each document is put into the fullest row with room for it, or into a new one.

    The fullest row is yielded when it is full, or when more than OPEN_ROWS rows are open.
    """
    rows: list[tuple[int, list[_Document]]] = []
    for document in documents:
        fits = [i for i, (used, _) in enumerate(rows) if used + document.chunks <= ROW_CHUNKS]
        if fits:
            used, held = rows.pop(max(fits, key=lambda i: rows[i][0]))
            rows.append((used + document.chunks, [*held, document]))
        else:
            rows.append((document.chunks, [document]))
        fullest = max(range(len(rows)), key=lambda i: rows[i][0])
        if rows[fullest][0] == ROW_CHUNKS or len(rows) > OPEN_ROWS:
            yield rows.pop(fullest)[1]
