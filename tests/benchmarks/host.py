"""What the host does in a turn of the real engine: the loop, the tables of blocks and pages, but no forward."""

import time
from typing import Any

import torch
from torch import Tensor

from model.cache import ContextCache
from model.forwards import Forwards
from model.loop import Loop
from model.params import Request
from model.rows import Rows
from model.sampling import Draws
from model.scheduler import Scheduler
from model.slots import PREFIX_SLOTS
from model.stages import Part
from model.tower import Tower
from model.two_tower import TwoTower
from tests.benchmarks.workload import requests

PROMPT, COMPLETION = 64, 128


class NoModel:
    """Stands for the pair: its forwards return their input."""

    def __init__(self, pair: TwoTower) -> None:
        self.config, self.stages, self.devices = pair.config, pair.stages[:1], pair.devices
        self.context = self.denoiser = object()

    def extend_parts(self, cache: ContextCache, rows: Rows) -> list[Any]:
        """See TwoTower."""
        del cache, rows
        return [_same]

    def denoise_parts(self, cache: ContextCache, rows: Rows, t: Tensor) -> list[Any]:
        """See TwoTower."""
        del cache, rows, t
        return [_same]


class HostOnly(Forwards):
    """Predicts token 5 with a random confidence, so that blocks take various numbers of steps."""

    def __init__(self, pair: TwoTower, cache: ContextCache) -> None:
        stand_in: Any = NoModel(pair)
        super().__init__(stand_in, cache)
        self._random = torch.Generator().manual_seed(0)

    def _predict(
        self, part: Part, tower: Tower, picked: Tensor, suppress: Tensor, draws: Draws | None, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        del part, tower, picked, draws, x
        return torch.full((len(suppress),), 5), torch.rand(len(suppress), generator=self._random)


def _same(x: Tensor) -> Tensor:
    return x


@torch.inference_mode()
def host_ms(pair: TwoTower, rows: int, *, turns: int) -> float:
    """Milliseconds of processor time of one turn with `rows` rows of diffusion in one lane."""
    cache = pair.new_cache(slots=rows + PREFIX_SLOTS, kv_tokens=rows * (PROMPT + COMPLETION + 64))
    loop = Loop(HostOnly(pair, cache), Scheduler(cache.slots, rows, 4096, 1))
    coming = iter(_work(pair, rows * (2 + turns // 8)))
    spent = 0.0
    for turn in range(-turns // 10, turns):
        while loop.waiting < rows:
            loop.submit(next(coming))
        began = time.process_time()
        loop.step()
        spent += (time.process_time() - began) * (turn >= 0)
    return 1e3 * spent / turns


def _work(pair: TwoTower, count: int) -> list[Request]:
    return requests(count, prompt_tokens=PROMPT, max_new_tokens=COMPLETION, vocabulary=pair.config.vocab_size)
