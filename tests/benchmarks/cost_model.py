"""Simulates a backend of the engine's loop: it computes nothing and says when forwards would end on simulated devices.

The scheduling is the engine's own (model.engine.loop, model.engine.scheduler). A layout says how long a forward takes,
and the steps of a row's block are drawn from a measured distribution. The module does not import torch, and its clock
is simulated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from model.engine.backend import Batch, BlockReport
from model.engine.sequence import ActiveRow, Prefix
from model.network.partition import partition
from model.runtime.page_allocator import PageAllocator
from tests.benchmarks.roofline import Roofline, Work

Ints = NDArray[np.int64]
Kind = Literal["context", "denoise"]
BLOCK = 16
_TOKEN = 5  # the token that every simulated completion consists of
_POOL = 1 << 20  # number of steps drawn at once


class Steps:
    """Draws the denoiser forwards of blocks from a histogram: steps -> number of blocks."""

    def __init__(self, histogram: Mapping[int, int], seed: int = 0) -> None:
        values, counts = np.array(list(histogram)), np.array(list(histogram.values()), dtype=float)
        self._pool = np.random.default_rng(seed).choice(values, _POOL, p=counts / counts.sum())
        self._next = 0

    def draw(self, count: int) -> Ints:
        """Return (count,) numbers of steps. The draws repeat after about a million."""
        if self._next + count > _POOL:
            self._next = 0
        self._next += count
        drawn: Ints = self._pool[self._next - count : self._next]
        return drawn


class Layout(Protocol):
    """The assignment of forwards to devices."""

    devices: int

    def route(self, kind: Kind, work: Work) -> Sequence[tuple[int, float]]:
        """Return the devices that a forward passes, in order, with its seconds on each."""

    def handover(self, kind: Kind, work: Work) -> float:
        """Return the seconds on the link between the devices after the forward, before its rows can continue."""


class Layers:
    """Two devices, each with some layers of both towers. Only hidden states cross the link (20 us, not counted)."""

    devices = 2

    def __init__(self, roofline: Roofline) -> None:
        """Split the layers as the engine does (model.network.partition)."""
        self.roofline = roofline
        self._context, self._denoiser = zip(*partition(roofline.config, self.devices), strict=True)

    def route(self, kind: Kind, work: Work) -> Sequence[tuple[int, float]]:
        """See Layout."""
        ranges = self._denoiser if kind == "denoise" else self._context
        return [(device, self.roofline.seconds(layers, work)) for device, layers in enumerate(ranges)]

    def handover(self, kind: Kind, work: Work) -> float:
        """See Layout."""
        del kind, work
        return 0.0


class Towers:
    """The context tower on device 0 and the denoiser tower on device 1. The Mamba states of a row, and its new keys and
    values, cross the link."""

    devices = 2

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline
        self.layers = range(roofline.config.num_layers)
        self._state = roofline.row_state_bytes(self.layers)
        self._kv = roofline.kv_bytes_per_token()

    def route(self, kind: Kind, work: Work) -> Sequence[tuple[int, float]]:
        """See Layout."""
        return [(int(kind == "denoise"), self.roofline.seconds(self.layers, work))]

    def handover(self, kind: Kind, work: Work) -> float:
        """See Layout."""
        if kind == "denoise":
            return 0.0
        return (work.rows * self._state + work.tokens * self._kv) / self.roofline.hardware.link


class Instant:
    """A layout in which forwards take no time, so that only the host's work remains."""

    devices = 0

    def route(self, kind: Kind, work: Work) -> Sequence[tuple[int, float]]:
        """See Layout."""
        del kind, work
        return ()

    def handover(self, kind: Kind, work: Work) -> float:
        """See Layout."""
        del kind, work
        return 0.0


@dataclass(slots=True)
class Device:
    """A simulated device, which runs forwards in the order of their launch."""

    free: float = 0.0
    """Simulated time at which its last forward ends."""
    busy: float = 0.0
    """Simulated seconds in which it computed."""


@dataclass(slots=True)
class Ticket:
    """A simulated forward: when it begins and ends, and the rows whose block it completes."""

    backend: "CostModel"
    began: float
    ended: float
    rows: Sequence[ActiveRow] = ()
    steps: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """See model.engine.backend.Launched."""
        return self.ended - self.began

    def result(self) -> Sequence[BlockReport]:
        """See model.engine.backend.Launched."""
        return self.backend.collect(self)


class CostModel:
    """A simulated backend of model.engine.loop.Loop, for diffusion rows. `host_s`: host seconds before a forward."""

    def __init__(self, slots: PageAllocator, layout: Layout, steps: Steps, *, host_s: float = 0.0) -> None:
        self.slots, self.layout, self.steps, self.host_s = slots, layout, steps, host_s
        self.now = 0.0
        self.devices = [Device() for _ in range(layout.devices)]
        self.tokens = 0
        """Committed tokens of all blocks."""
        self._link_free = 0.0
        self._context = np.zeros(slots.slots, np.int64)
        self._ready = np.zeros(slots.slots)  # when a row's states have reached the denoiser's device
        self._needed = np.ones(slots.slots, np.int64)
        self._taken = np.zeros(slots.slots, np.int64)
        self._full_block = [_TOKEN] * BLOCK, [1.0] * BLOCK

    def clock(self) -> float:
        """Return the simulated time in seconds."""
        return self.now

    def add_slots(self, count: int) -> None:
        """See Backend."""
        raise NotImplementedError("simulated runs keep their number of rows")

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """See Backend."""
        slots = _slots(rows)
        self._context[slots] = [self.slots.length(row.slot) for row in rows]
        self._ready[slots] = 0.0

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """See Backend."""
        del ar_tokens
        slots = _slots(rows)
        self._needed[slots] = self.steps.draw(len(rows))
        self._taken[slots] = 0

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Ticket:
        """See Backend."""
        assert not fill, "AR rows are not simulated"
        rows, counts = [item for item, _ in batch], [count for _, count in batch]
        slots, tokens = _slots(rows), np.array(counts)
        context = self._context[slots]
        pairs = float((tokens * (context + tokens / 2)).sum())
        work = Work(len(rows), int(tokens.sum()), int(context.sum()), pairs, store=True)
        ticket = self._launch("context", work, self.now)
        # without a handover the order on each device is enough: later forwards find the states in place
        if link := self.layout.handover("context", work):
            self._link_free = max(ticket.ended, self._link_free) + link
            self._ready[slots] = self._link_free
        self._context[slots] += tokens
        self.slots.grow(slots.tolist(), counts)
        return ticket

    def denoise(self, rows: Sequence[ActiveRow]) -> Ticket:
        """See Backend."""
        slots = _slots(rows)
        needed, taken = self._needed[slots], self._taken[slots]
        context = int(self._context[slots].sum())
        tokens = BLOCK * len(rows)
        # assumes that a block loses its masks evenly over its steps
        masked = round(BLOCK * float((1 - taken / needed).sum()))
        work = Work(len(rows), tokens, context, BLOCK * (context + tokens), masked)
        ticket = self._launch("denoise", work, float(self._ready[slots].max()))
        self._taken[slots] += 1
        done = np.flatnonzero(taken + 1 >= needed)
        ticket.rows, ticket.steps = [rows[i] for i in done.tolist()], needed[done].tolist()
        self.tokens += BLOCK * len(done)
        return ticket

    def _launch(self, kind: Kind, work: Work, ready: float) -> Ticket:
        self.now += self.host_s
        began, at = None, max(ready, self.now)
        for number, seconds in self.layout.route(kind, work):
            device = self.devices[number]
            at = max(at, device.free)
            began = at if began is None else began
            at += seconds
            device.free = at
            device.busy += seconds
        return Ticket(self, at if began is None else began, at)

    def collect(self, ticket: Ticket) -> Sequence[BlockReport]:
        """Let the time pass in which the forward computes, and return the blocks that it completes."""
        self.now = max(self.now, ticket.ended)
        return [
            BlockReport(row, BLOCK, True, row.room <= BLOCK, False, steps, *self._full_block)
            for row, steps in zip(ticket.rows, ticket.steps, strict=True)
        ]

    def out_of_memory(self, error: BaseException) -> bool:
        """See Backend."""
        del error
        return False


def _slots(rows: Sequence[ActiveRow | Prefix]) -> Ints:
    return np.array([row.slot for row in rows], dtype=np.int64)
