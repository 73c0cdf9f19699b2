"""Measures single forwards against their floor: the least time to move their bytes or to compute their products."""

from dataclasses import dataclass

import torch

from model.network.context_cache import ContextCache
from model.network.layers.attention import AttentionState
from model.network.layers.mamba2 import MambaState
from model.network.tower import Tower
from model.network.two_tower import TwoTower
from model.runtime.page_allocator import PAGE_SIZE, pages_for
from model.runtime.ragged_batch import RaggedBatch
from tests.benchmarks.gpu.ceilings import seconds
from tests.benchmarks.roofline import Hardware, Roofline, Work

BLOCK = 16
KINDS = ("denoise", "commit", "ar")


@dataclass(frozen=True, slots=True)
class Timing:
    """The measured time of one forward, and its floor."""

    kind: str
    rows: int
    context: int
    ms: float
    floor_ms: float

    @property
    def over_floor(self) -> float:
        return self.ms / self.floor_ms


class Bench:
    """Measures forwards of `rows` rows with `context` tokens each, whose states, keys and values are random numbers."""

    def __init__(self, pair: TwoTower, hardware: Hardware, rows: int, context: int) -> None:
        self.pair, self.rows, self.context = pair, rows, context
        self.device = pair.devices[-1]
        self.roofline = Roofline(pair.config, hardware)
        tokens = context + BLOCK
        self.cache = pair.new_cache(slots=rows, kv_tokens=rows * pages_for(tokens) * PAGE_SIZE)
        self.slots = [slot for _ in range(rows) if (slot := self.cache.allocator.acquire(tokens)) is not None]
        self.cache.allocator.grow(self.slots, [context] * rows)
        _fill(self.cache)

    @torch.inference_mode()
    def time(self, kind: str) -> Timing:
        """Time a forward of one of KINDS, from input tokens to chosen tokens.

        The head computes half of the positions of a block in "denoise", all positions in "ar", and none in "commit".
        """
        call = {"denoise": self._denoise, "commit": self._commit, "ar": self._ar}[kind]
        took = seconds(call, self.device)
        return Timing(kind, self.rows, self.context, took * 1e3, self._floor(kind) * 1e3)

    def _rows(self, tokens: int) -> tuple[RaggedBatch, torch.Tensor]:
        ids = torch.arange(self.rows * tokens) % (self.pair.config.vocab_size - 4) + 4
        return self.cache.rows(self.slots, [tokens] * self.rows), ids

    def _denoise(self) -> None:
        rows, ids = self._rows(BLOCK)
        hidden = self.pair.denoise(self.cache, rows, ids, torch.full((self.rows,), 0.5))
        assert self.pair.denoiser is not None
        self._choose(self.pair.denoiser, hidden[::2])

    def _commit(self) -> None:
        rows, x = self._rows(BLOCK)
        for part in self.pair.extend_parts(self.cache, rows):  # lengths in the cache stay: each call does the same
            x = part(x)

    def _ar(self) -> None:
        rows, x = self._rows(1)
        for part in self.pair.extend_parts(self.cache, rows):
            x = part(x)
        self._choose(self.pair.context, x)

    def _choose(self, tower: Tower, hidden: torch.Tensor) -> None:
        suppress = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        tokens, confidence = tower.choose(hidden, suppress, None)
        tokens.cpu(), confidence.cpu()

    def _floor(self, kind: str) -> float:
        tokens = self.rows * (1 if kind == "ar" else BLOCK)
        logits = {"denoise": tokens // 2, "commit": 0, "ar": tokens}[kind]
        pairs = tokens * (self.context + (1 if kind == "ar" else BLOCK))
        work = Work(self.rows, tokens, self.rows * self.context, pairs, logits, store=kind != "denoise")
        return self.roofline.seconds(range(self.pair.config.num_layers), work)


def _fill(cache: ContextCache) -> None:
    for state in cache.layers:
        if isinstance(state, MambaState):
            state.conv.normal_()
            state.ssm.normal_()
        elif isinstance(state, AttentionState):
            state.pages.normal_()
