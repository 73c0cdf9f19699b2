"""Packs examples for training, as documents of token ids, into rows of a fixed number of chunks.

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

ROW_CHUNKS = 18
OPEN_ROWS = 64  # limit of the rows that wait for a document that fits
PROMPT_WEIGHT = 0.1
"""Weight of a prompt's tokens in the context tower's loss. It is low because most of a prompt is random; it is not 0
because the solved examples in a prompt can be predicted."""


EPOCH_ROWS = 20_000  # rows that are made at once; each epoch has other rows

Batch = dict[str, Tensor]
"""The rows of a step: the fields of Rows, and for the denoiser also chunk (B, K), t (B, K) and masked (B, K, Q)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Training examples packed into R rows of T = ROW_CHUNKS * CHUNK tokens: token ids, masks and weights of the loss.
    A row here holds several documents."""

    ids: np.ndarray  # (R, T) int64
    real: np.ndarray  # (R, T) bool: False at padding in front of a prompt and in unused chunks
    document: np.ndarray  # (R, ROW_CHUNKS) int64
    weight: np.ndarray  # (R, T) float32: weight in the loss of predicting the next token
    is_block: np.ndarray  # (R, ROW_CHUNKS) bool: True if the chunk belongs to a completion
    live: np.ndarray  # (R, T) bool: True in a document up to and including its end of text


@dataclass(frozen=True, slots=True)
class _Document:
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
    """Return examples for evaluation that fit into ROW_CHUNKS chunks (prompt and answer), like those for training."""
    fitting = (example for example, document in _documents(tokenizer, examples(seed, held_out=True)) if document.fits)
    return list(islice(fitting, count))


def training_rows(tokenizer: Tokenizer, seed: int, count: int, shares: Mapping[str, float] | None = None) -> Rows:
    """Return `count` rows of training examples; the same seed gives the same rows."""
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
    """The batches of a phase, by step number."""

    def __init__(self, tokenizer: Tokenizer, seed: int, shares: Mapping[str, float]) -> None:
        self._tokenizer, self._seed, self._shares = tokenizer, seed, shares
        self._epoch = -1
        self._rows: Rows | None = None

    def batch(self, step: int, rows: int) -> Batch:
        """Return the rows of one step: the fields of Rows as tensors."""
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
    """Choose blocks of completions and mask them: return the batch with chunk (B, K), t (B, K) and masked (B, K, Q)."""
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
    while True:
        batch = list(islice(source, 1000))
        prompts = tokenizer.encode_batch_fast([example.prompt for example in batch])
        answers = tokenizer.encode_batch_fast([example.answer for example in batch])
        for example, prompt, answer in zip(batch, prompts, answers, strict=True):
            yield example, _Document(prompt.ids, [*answer.ids, EOS])


def _pack(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Put each document into the fullest row with room for it. Yield the fullest row when it is full, or when too many
    rows are open."""
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
