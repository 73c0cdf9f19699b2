"""Runs the baseline: static batches in lockstep, like the released inference code, on the same forwards as the engine.

All rows of a batch start together. Every denoiser forward computes all rows until the slowest row's block is done, with
one t for the batch and float32 logits of every position over the whole vocabulary. Then one context forward takes the
blocks of all rows. No row is replaced before the batch ends. In the baseline's favour, prompts of unequal lengths are
computed as the engine computes them (the released code does not accept them), and `serve` sorts prompts by length, so
that those of a batch are as similar in length as possible.

Shapes: R rows of the batch, S positions of a block, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.engine.unmasking import positions_to_commit
from model.network.context_cache import ContextCache
from model.network.two_tower import TwoTower
from model.requests import GenerationParams, Request
from model.runtime.page_allocator import PAGE_SIZE, pages_for


@dataclass(slots=True)
class Batch:
    """The tokens that a batch generated, and the forwards that it took."""

    tokens: list[list[int]]
    """Tokens of each row, in whole blocks."""
    steps_per_block: list[int] = field(default_factory=list)
    """Denoiser forwards of the batch for each block, which are those of its slowest row."""
    trace: list[Tensor] = field(default_factory=list)
    """(R, S) int64 for each denoiser forward: the blocks that are its input."""


def serve(pair: TwoTower, requests: Sequence[Request], rows: int) -> list[list[int]]:
    """Run the requests in batches of `rows`, longest prompts first.

    Returns each one's tokens, in the requests' order. A batch runs until its longest completion is done. Raises
    ValueError if the rows of a batch differ in block_size or steps_per_block, or if its longest max_new_tokens is not a
    multiple of block_size.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
    done: list[list[int]] = [[] for _ in requests]
    for first in range(0, len(order), rows):
        members = order[first : first + rows]
        longest = max(requests[i].params.max_new_tokens for i in members)
        params = [replace(requests[i].params, max_new_tokens=longest) for i in members]
        batch = generate(pair, [requests[i].prompt_ids for i in members], params)
        for i, tokens in zip(members, batch.tokens, strict=True):
            done[i] = tokens[: requests[i].params.max_new_tokens]
    return done


@torch.inference_mode()
def generate(pair: TwoTower, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams]) -> Batch:
    """Generate one static batch greedily, up to max_new_tokens or to the first block in which a row commits an EOS."""
    size, steps, length = _shared_settings(params)
    thresholds = torch.tensor([p.confidence_threshold for p in params])
    cache, slots = _cache(pair, [len(prompt) + length for prompt in prompts])
    lengths = [len(prompt) for prompt in prompts]
    pair.extend(cache, cache.rows(slots, lengths), torch.tensor([token for prompt in prompts for token in prompt]))
    batch = Batch([[] for _ in prompts])
    eos_ids = torch.tensor(params[0].eos_ids, dtype=torch.int64)
    for _ in range(length // size):
        blocks = _block(pair, cache, slots, size, steps, thresholds, batch)
        pair.extend(cache, cache.rows(slots, [size] * len(slots)), blocks.flatten())
        for row, block in zip(batch.tokens, blocks.tolist(), strict=True):
            row.extend(block)
        if torch.isin(blocks, eos_ids).any():
            break
    return batch


def _shared_settings(params: Sequence[GenerationParams]) -> tuple[int, int, int]:
    """Return (block_size, steps_per_block, max_new_tokens) of a batch.

    Raises ValueError if the rows differ in them, or if max_new_tokens is not a multiple of block_size.
    """
    shared = {(p.block_size, p.steps_per_block, p.max_new_tokens) for p in params}
    if len(shared) != 1:
        raise ValueError(f"a batch has one block_size, steps_per_block and max_new_tokens, not {sorted(shared)}")
    size, steps, length = shared.pop()
    if length % size:
        raise ValueError(f"max_new_tokens is {length}: it must be a multiple of block_size {size}")
    return size, steps, length


def _cache(pair: TwoTower, tokens: Sequence[int]) -> tuple[ContextCache, list[int]]:
    """Return a cache, and a slot for each row with pages for `tokens[r]` tokens."""
    cache = pair.new_cache(slots=len(tokens), kv_tokens=PAGE_SIZE * sum(map(pages_for, tokens)))
    slots = [slot for count in tokens if (slot := cache.allocator.acquire(count)) is not None]
    assert len(slots) == len(tokens)
    return cache, slots


def _block(
    pair: TwoTower,
    cache: ContextCache,
    slots: Sequence[int],
    size: int,
    steps: int,
    thresholds: Tensor,
    batch: Batch,
) -> Tensor:
    """Denoise one block of every row until the slowest is done, and return the (R, S) ids."""
    mask_id = pair.config.mask_token_id
    blocks = torch.full((len(slots), size), mask_id)
    masked = torch.ones_like(blocks, dtype=torch.bool)
    rows = cache.rows(slots, [size] * len(slots))
    assert pair.denoiser is not None
    step = 0
    while masked.any():
        batch.trace.append(blocks)
        t = masked.float().mean().expand(len(slots))  # one t: the mean masked fraction of the batch
        logits = pair.denoiser.logits(pair.denoise(cache, rows, blocks.flatten(), t))
        logits[:, mask_id] = -torch.inf
        best = logits.log_softmax(-1).max(-1)  # over all R * S positions
        confidence = best.values.exp().view(blocks.shape)
        left = torch.full((len(slots),), steps - step)
        commit = positions_to_commit(masked, confidence, thresholds, left)
        blocks = torch.where(commit, best.indices.view(blocks.shape), blocks)
        masked = masked & ~commit
        step += 1
    batch.steps_per_block.append(step)
    return blocks
