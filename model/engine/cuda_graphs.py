"""Runs forwards over blocks and single tokens as CUDA graphs: each size is recorded once, then replayed by one launch.

A forward consists of hundreds of kernels. If the host launches them one by one, this takes longer than the device needs
to compute a forward over few rows. A graph runs kernels of fixed sizes on fixed addresses. A forward is therefore put
into a bucket of at least its own size, and everything else that the kernels must know is in tensors that the graph
reads: slots, seeds, starts and lengths of the rows, the plan of their attention, and their times. Forwards over longer
pieces of prompts are launched kernel by kernel.

Padding consists of rows of length 0 and of tokens that belong to no row. For such a row kernels read and write nothing.
The hidden states of such a token are set to NaN, and no layer mixes them with another token: norms, projections, the
router, experts and the residual treat every token by itself; convolution, scan and attention follow the rows; and the
heads get real tokens only. Scan and attention leave whatever was in memory as the result for such a token, but the
residual, to which the result is added, stays NaN. So all of these tokens choose the same few experts, and few weights
are read for them.

Only for CUDA: importing this module needs Triton. The graphs of a stage share their buffers and one pool of memory, and
must be replayed on one stream, one after the other; model.runtime.stages does that.
"""

import threading
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.kernels.triton.attention import heads_over
from model.kernels.triton.attention_plan import ITEM, JOIN, Heads, Paged, Room, plan_attention, power_of_two
from model.kernels.triton.kernels import BLOCK
from model.network.context_cache import ContextCache
from model.network.layers.attention import AttentionState
from model.network.two_tower import TwoTower
from model.runtime.device_errors import device_lost, first_line
from model.runtime.page_allocator import pages_for
from model.runtime.ragged_batch import RaggedBatch, RowIndex
from model.runtime.stages import Part
from model.runtime.transfer import Array, to_device

T = TypeVar("T")
Kind = Literal["extend", "denoise", "denoise without time"]
"""The kind of a forward. "denoise without time" has no time conditioning: all its rows are in mock_ar mode."""
Run = Callable[[], None]
Record = Callable[[Run], Run]
"""A recorder: takes a function that works on fixed tensors and returns a function that does the same work again. The
work need not be done while it is recorded."""

MAX_VOID = 256
"""Number of padding tokens that a bucket may always have. A forward that would need more than this, and more than a
quarter of its real tokens, is launched kernel by kernel: computing the padding would take longer than the launches."""


class Bucket(NamedTuple):
    """The size of a graph. A graph serves all forwards whose own sizes are rounded up to its bucket."""

    rows: int
    longest: int
    """The number of tokens for which each row has room."""

    @classmethod
    def of(cls, rows: int, longest: int) -> "Bucket":
        """Return the bucket for `rows` rows of at most `longest` tokens.

        Up to 16 rows, which take little more than the time to read the weights, the number of rows is rounded up to a
        power of two. Above that, it is rounded up to a multiple of an eighth of the power of two below it (18, 20, …,
        32, 36, …, 64, 72, …), so that at most a ninth is padding. `longest` is rounded up to a power of two.
        """
        step = max(1, power_of_two(rows) // 16)
        return cls(power_of_two(rows) if rows <= 16 else -(-rows // step) * step, power_of_two(longest))

    @property
    def tokens(self) -> int:
        return self.rows * self.longest


class Graphs:
    """The forwards `TwoTower.extend_parts` and `denoise_parts` over one cache, as graphs if they fit a bucket.

    The result of a part is in a buffer that the stage's next part overwrites. The first forward of a bucket runs kernel
    by kernel on the tensors of the graph and is recorded afterwards.
    """

    def __init__(
        self, pair: TwoTower, cache: ContextCache, record: Callable[[torch.device], Record] | None = None
    ) -> None:
        """Start without any graphs. record: makes the recorder of a device; tests without a GPU pass their own."""
        self.pair, self.cache = pair, cache
        self._recorder = record or CudaRecorder
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and their memory. Must be called if the cache's tensors move; no forward may be in
        progress."""
        states = [layer.pages for layer in self.cache.layers if isinstance(layer, AttentionState)]
        self._heads = heads_over(self.pair.config.num_attention_heads, states[0]) if states else None
        self._most = Bucket.of(self.cache.allocator.slots, BLOCK)
        self._pages = min(self.cache.allocator.pages, pages_for(self.pair.config.max_position_embeddings + BLOCK))
        self._buffers: dict[Hashable, Tensor] = {}
        self._records = [self._recorder(stage.device) for stage in self.pair.stages]
        self._graphs: dict[tuple[Kind, Bucket, int], _Graph] = {}

    def extend_parts(self, rows: RaggedBatch) -> list[Part]:
        """Return the parts of an extend, as `TwoTower.extend_parts` does, but they replay graphs if the rows fit a
        bucket."""
        bucket = self._bucket(rows)
        if bucket is None:
            return self.pair.extend_parts(self.cache, rows)
        return self._parts("extend", bucket, rows, torch.zeros(0))

    def denoise_parts(self, rows: RaggedBatch, t: Tensor) -> list[Part]:
        """Return the parts of a denoiser forward, as `TwoTower.denoise_parts` does, but they replay graphs if the rows
        fit a bucket. t: (R,), on the host; all NaN means without time conditioning."""
        bucket = self._bucket(rows)
        if bucket is None:
            return self.pair.denoise_parts(self.cache, rows, t)
        return self._parts("denoise without time" if t.isnan().all() else "denoise", bucket, rows, t)

    def _bucket(self, rows: RaggedBatch) -> Bucket | None:
        """Return the bucket of a forward, or None if it is to be launched kernel by kernel: a row or its context is too
        long, there are too many rows, or the bucket would have too much padding."""
        longest, tokens = max(rows.lengths), sum(rows.lengths)
        bucket = Bucket.of(len(rows.lengths), longest)
        behind = max(length + before for length, before in zip(rows.lengths, rows.context, strict=True))
        fits = longest <= BLOCK and bucket.rows <= self._most.rows and pages_for(behind) <= self._pages
        return bucket if fits and bucket.tokens - tokens <= max(MAX_VOID, tokens // 4) else None

    def _parts(self, kind: Kind, bucket: Bucket, rows: RaggedBatch, t: Tensor) -> list[Part]:
        """Return one part for each stage, which writes the forward's values to its graph and replays it. t: (R,), empty
        for an extend."""
        times = np.zeros(bucket.rows)
        times[: len(t)] = t
        numbers = np.concatenate([rows.packed(bucket.rows, bucket.tokens), times.view(np.int64)])
        plan = plan_attention(rows, self._heads, self._room(bucket, self._heads)) if self._heads else None
        feed = _Feed(numbers, plan, sum(rows.lengths))
        return [partial(self._run, kind, bucket, feed, stage) for stage in range(len(self.pair.stages))]

    def _room(self, bucket: Bucket, heads: Heads) -> Room:
        return Room.of(heads, bucket.rows, bucket.longest, self._pages)

    def _run(self, kind: Kind, bucket: Bucket, feed: "_Feed", stage: int, x: Tensor) -> Tensor:
        """Run one stage's part of a forward, with a new graph if this bucket has none yet. x: tokens in the first
        stage, hidden states in the others."""
        hidden = self.pair.enter("context" if kind == "extend" else "denoiser", x, stage)
        key = kind, bucket, stage
        if key not in self._graphs:
            self._graphs[key] = self._new(*key, hidden.device)
        return self._graphs[key](hidden, feed)

    def _new(self, kind: Kind, bucket: Bucket, stage: int, device: torch.device) -> "_Graph":
        """Return a graph that is not recorded yet. All graphs of a stage share the buffer of the attention plan; those
        with equally long rows share the buffer of the hidden states."""
        pair, cache = self.pair, self.cache

        def layers(rows: RaggedBatch, hidden: Tensor, t: Tensor) -> Tensor:
            if kind == "extend":
                return pair.extend_layers(cache, rows, hidden, stage)
            return pair.denoise_layers(cache, rows, hidden, (t, None) if kind == "denoise" else None, stage)

        shape = self._most.rows * bucket.longest, pair.config.hidden_size
        hidden = self._buffer((stage, bucket.longest), lambda: torch.empty(shape, dtype=pair.dtype, device=device))
        plan = None
        if heads := self._heads:
            size = _size(self._room(self._most, heads))
            buffer = self._buffer((stage, "plan"), lambda: torch.zeros(size, dtype=torch.int32, device=device))
            room = self._room(bucket, heads)
            plan = Paged(buffer[: _size(room)], room, 0)
        numbers = torch.zeros(5 * bucket.rows + bucket.tokens, dtype=torch.int64, device=device)
        name = f"{kind} of {bucket.rows} x {bucket.longest} (rows x tokens) on stage {stage}"
        rows, times = _FixedRows.of(bucket, numbers, heads, plan), numbers[-bucket.rows :].view(torch.float64)
        record = self._records[stage]
        return _Graph(name, partial(layers, rows), hidden[: bucket.tokens], numbers, times, plan, record)

    def _buffer(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the buffer with this key, made on first use."""
        if key not in self._buffers:
            self._buffers[key] = make()
        return self._buffers[key]


@dataclass(frozen=True, slots=True)
class _Feed:
    """The values, on the host, that one forward writes into the tensors of its graphs before they are replayed."""

    numbers: Array  # (4 R + N + R,) int64: RaggedBatch.packed, then the bits of each row's time as float64
    plan: Paged | None  # of the attention; None if the model has no attention layers
    tokens: int  # of the forward, without padding


class _FixedRows(RaggedBatch):
    """The rows of a forward as they are known when a graph is recorded: only their number and greatest length. All else
    is read from tensors when the graph is replayed."""

    @classmethod
    def of(cls, bucket: Bucket, numbers: Tensor, heads: Heads | None, plan: Paged | None) -> "_FixedRows":
        """Return rows for all forwards of the bucket; their data is read from the tensors `numbers` and `plan`."""
        count = bucket.rows
        index = RowIndex.of(numbers[: 4 * count + bucket.tokens], count)
        made = {numbers.device: index, (numbers.device, heads): plan}
        return cls((0,) * count, (-1,) * count, (bucket.longest,) * count, (0,) * count, ((),) * count, made)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:  # noqa: ARG002
        """Return what was made at the start. Raises KeyError for any other key: its value would be recorded as it is
        now and never change."""
        made: T = self._made[key]
        return made


class _Graph:
    """The forwards of one kind and bucket on one stage: the tensors that they share, and how to replay them."""

    def __init__(
        self,
        name: str,
        layers: Callable[[Tensor, Tensor], Tensor],
        hidden: Tensor,  # (N, H), input and output
        numbers: Tensor,
        times: Tensor,  # (R,) float64, a view of `numbers`
        plan: Paged | None,
        record: Record,
    ) -> None:
        self.name, self.layers, self.record = name, layers, record
        self.hidden, self.numbers, self.times, self.plan = hidden, numbers, times, plan
        self.replay: Run | None = None

    def __call__(self, x: Tensor, feed: _Feed) -> Tensor:
        """Take the hidden states x (n, H) of the forward's real tokens and return those after the layers, (n, H), in a
        buffer that the next call overwrites. The first call computes without a graph, then records one."""
        self.hidden[: feed.tokens].copy_(x)
        self.hidden[feed.tokens :].fill_(torch.nan)
        self.numbers.copy_(to_device(feed.numbers, self.numbers.device))
        if self.plan is not None and feed.plan is not None:
            self.plan.fill(feed.plan)
        if self.replay is not None:
            self.replay()
        else:  # compiles kernels and prepares cuBLAS, which cannot be recorded
            self.compute()
            self.replay = self._recorded()
        return self.hidden[: feed.tokens]

    def compute(self) -> None:
        """Run the layers on the buffers, kernel by kernel."""
        self.hidden.copy_(self.layers(self.hidden, self.times.float()))

    def _recorded(self) -> Run:
        """Return the replay of a recorded graph; if recording fails, warn and return `compute`. An error after which
        the device is lost is raised again."""
        try:
            return self.record(self.compute)
        except Exception as error:  # whatever the error is, the forward also works without a graph
            if device_lost(error):
                raise
            told = f"no CUDA graph for {self.name}, which will be launched kernel by kernel: {first_line(error)}"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
            return self.compute


class CudaRecorder:
    """A recorder (see Record) that captures CUDA graphs on one device. They share one pool, which holds the memory that
    the largest graph needs while it runs."""

    _one_at_a_time = threading.Lock()  # captures of all recorders in this process

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._captured = False

    def __call__(self, run: Run) -> Run:
        """Capture `run` on the device's current stream and return the function that replays it.

        `run` must have run once before, and the stream must not be the default one. Other threads may launch and
        allocate meanwhile. Raises the errors of `run`, and CUDA's error if the capture fails.
        """
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph: it waits for the device, empties the allocator's cache, uses one stream for all devices
        # and stays on that stream if a capture fails
        with self._one_at_a_time, torch.cuda.device(self._device):
            try:
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                run()
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):  # an invalid or ended capture was already reported
                    graph.capture_end()
                if not self._captured:  # the pool is freed together with its only graph
                    self._pool = torch.cuda.graph_pool_handle()
                raise
        self._captured = True
        return graph.replay


def _size(room: Room) -> int:
    """Return the number of int32 values of an attention plan with these sizes."""
    return ITEM * room.items + JOIN * room.joins + room.pages
