"""Tests forwards that are put into buckets and replayed against forwards of the model itself, on a GPU with real CUDA
graphs.

Without a GPU, the replayed kernels are interpreted, the model's own kernels are plain, and a stand-in for the recorder
runs the work again. Everything that a replayed forward must know is then in tensors, because the rows that it is run
with know nothing of the forward.
"""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.builtin.noise import CONFIG
from model.checkpoint.config import TwoTowerConfig
from model.engine.cuda_graphs import Bucket, CudaRecorder, Graphs, Run
from model.kernels.plain import PlainKernels
from model.kernels.triton import attention_plan
from model.kernels.triton.kernels import BLOCK, CudaKernels
from model.network.context_cache import ContextCache
from model.network.layers.attention import AttentionState
from model.network.layers.mamba2 import MambaState
from model.network.two_tower import TwoTower, load_model
from model.runtime.page_allocator import PAGE_SIZE
from model.runtime.ragged_batch import RaggedBatch
from model.runtime.stages import Part
from tests.model import golden_cases as golden

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
NAN = float("nan")
CLOSE = 2e-5
"""Largest max|difference| / max|right| that float32 kernels may have; see model.checks.kernels."""
SLIM = replace(  # layer kinds of builtin:noise for two stages; narrow, as many programs are slow in the interpreter
    TwoTowerConfig.from_dict({**CONFIG, "hybrid_override_pattern": "ME*E", "num_hidden_layers": 4}),
    hidden_size=32,
    mamba_num_heads=2,
    n_groups=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    n_routed_experts=4,
)
# numpy warns of NaN in the interpreter
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")]


class RowKernels(CudaKernels):
    """Kernels for tests without a GPU: those that follow the rows are Triton's; those that treat each token by itself
    are plain, which is faster."""

    linear = PlainKernels.linear
    rms_norm = staticmethod(PlainKernels.rms_norm)
    modulated_norm = PlainKernels.modulated_norm
    gated_add = PlainKernels.gated_add
    gated_norm = staticmethod(PlainKernels.gated_norm)
    choose_experts = PlainKernels.choose_experts
    experts = PlainKernels.experts
    squared_relu = PlainKernels.squared_relu


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan few attention programs, because the interpreter needs time even for programs without work."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_plan, "PROGRAMS", 4)


def slim(stages: int = 1, kernels: type[PlainKernels] = RowKernels) -> TwoTower:
    """Return a small model that always has the same weights. kernels: the kernels to use on a CPU."""
    pair = TwoTower(SLIM, torch.float32, [torch.device(DEVICE)] * stages)
    generator = torch.Generator().manual_seed(1)
    for name, target in pair.checkpoint_targets().items():
        value = torch.randn(target.shape, generator=generator)
        scale = 0.3 if value.ndim < 2 or "tables" in name else value.shape[-1] ** -0.5
        target.copy_(value * scale + (1 if "norm" in name else 0))
    pair.share_time()
    if DEVICE == "cpu":
        chosen: Any = kernels()
        chosen._prefill_scan = None  # mamba-ssm's kernel, if it is installed, needs a GPU
        for module in pair.modules():
            if hasattr(module, "kernels"):
                module.kernels = chosen
    return pair


class Refusing(TorchDispatchMode):
    """A mode that raises if an operation makes the host wait for a device or has a size that only the device knows."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives its modes no types

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::")
        by_mask = name.startswith("index") and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args)
        if by_mask or name.startswith(self.WAITING):
            raise AssertionError(f"{name} cannot be captured")
        return func(*args, **(kwargs or {}))


class Recorder:
    """A stand-in for the recorder of CUDA graphs; its replay runs the work again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, device: torch.device) -> Callable[[Run], Run]:
        assert device.type == DEVICE
        return self.record

    def record(self, run: Run) -> Run:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with Refusing():
                run()

        return replay


class Twins:
    """The same rows in two caches: one for the model's own forwards, and one for replayed ones."""

    def __init__(
        self,
        pair: TwoTower,
        rows: int,
        *,
        right: TwoTower | None = None,
        record: Recorder | None = None,
        kv_tokens: int = 16 * PAGE_SIZE,
    ) -> None:
        self.pair, self.recorder = right or slim(kernels=PlainKernels), record or Recorder()
        self.caches = [pair.new_cache(slots=rows + 1, kv_tokens=kv_tokens) for _ in range(2)]
        for cache in self.caches:
            self.slots = [slot for _ in range(rows) if (slot := cache.allocator.acquire(2 * PAGE_SIZE)) is not None]
            for tensor in states(cache):
                tensor.fill_(torch.nan)  # nothing may be read that has not been written
        self.graphs = Graphs(pair, self.caches[1], self.recorder if DEVICE == "cpu" else None)

    def extend(self, slots: Sequence[int], lengths: Sequence[int], tokens: Tensor) -> None:
        """Check that both ways give the same hidden states and contexts, and that only the contexts of these rows are
        written."""
        plain, ours = (cache.rows(slots, lengths) for cache in self.caches)
        before = [tensor.clone() for tensor in states(self.caches[1])]
        right = run(self.pair.extend_parts(self.caches[0], plain), tokens)
        close(run(self.graphs.extend_parts(ours), tokens), right)
        for cache, rows in zip(self.caches, (plain, ours), strict=True):
            cache.grow(rows)
        both = zip(before, *(states(cache) for cache in self.caches), strict=True)
        for old, expected, got in both:
            written = expected.nan_to_num(nan=1e9) != old.nan_to_num(nan=1e9)
            assert torch.equal(got[~written].nan_to_num(), old[~written].nan_to_num())
            assert got[written].isfinite().all()
            close(got[written], expected[written])

    def denoise(self, slots: Sequence[int], lengths: Sequence[int], tokens: Tensor, t: Tensor) -> None:
        """Check that both ways give the same hidden states and leave the contexts as they were."""
        before = [tensor.clone() for tensor in states(self.caches[1])]
        right = run(self.pair.denoise_parts(self.caches[0], self.caches[0].rows(slots, lengths), t), tokens)
        close(run(self.graphs.denoise_parts(self.caches[1].rows(slots, lengths), t), tokens), right)
        for old, now in zip(before, states(self.caches[1]), strict=True):
            assert torch.equal(old.nan_to_num(), now.nan_to_num())


def states(cache: ContextCache) -> Iterator[Tensor]:
    for layer in cache.layers:
        if isinstance(layer, MambaState):
            yield from (layer.conv, layer.ssm)
        if isinstance(layer, AttentionState):
            yield layer.pages


def run(parts: Sequence[Part], x: Tensor) -> Tensor:
    with torch.inference_mode():
        for part in parts:
            x = part(x).clone()  # model.runtime.stages copies between stages, too
    return x


def close(got: Tensor, right: Tensor, allowed: float = CLOSE) -> None:
    assert got.shape == right.shape
    assert right.isfinite().all()
    if got.numel():
        assert golden.relative_error(got.cpu(), right.cpu()) < allowed


def some_tokens(count: int) -> Tensor:
    return torch.randint(4, 200, (count,), generator=torch.Generator().manual_seed(count))


def test_buckets_are_few_and_waste_little() -> None:
    """There are few buckets, and every size fits its own. Above 16 rows at most a ninth of a bucket is padding, below
    that less than half."""
    for rows in range(1, 1000):
        bucket = Bucket.of(rows, 16)
        assert rows <= bucket.rows <= (rows + (bucket.rows + 8) // 9 if rows > 16 else 2 * rows - 1)
        assert Bucket.of(bucket.rows, bucket.longest) == bucket
    assert len({Bucket.of(rows, 16) for rows in range(1, 385)}) == 41
    assert [Bucket.of(1, longest).longest for longest in (1, 2, 3, 16, 20, 32)] == [1, 2, 4, 16, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_replayed_forwards_are_those_launched_kernel_by_kernel(stages: int) -> None:
    """Replayed extends, AR steps and denoiser forwards of ragged rows give what launches kernel by kernel give, with
    other rows, contexts and times in each turn."""
    twins, draw = Twins(slim(stages), 3), random.Random(stages)
    for _ in range(3):
        slots = draw.sample(twins.slots, 3 if stages == 1 else draw.choice([2, 3]))
        lengths = [draw.randint(1, 4) for _ in slots]
        lengths[0] = 3 + draw.randint(0, 1)
        t = torch.tensor([draw.choice([NAN, 0.25, 1.0]) for _ in slots])
        t[-1] = 0.5
        twins.denoise(slots, lengths, some_tokens(sum(lengths)), t)
        twins.extend(slots, lengths, some_tokens(sum(lengths)))
        twins.extend(slots, [1] * len(slots), some_tokens(len(slots)))
    if DEVICE == "cpu":
        assert twins.recorder.replayed + twins.recorder.recorded == 9 * stages
        assert twins.recorder.recorded <= 6 * stages


@pytest.mark.slow
def test_mock_ar_alone_needs_no_times() -> None:
    """If all t are NaN, another graph is used, which forwards with times do not share. All kernels are those for a
    GPU."""
    twins = Twins(slim(kernels=CudaKernels), 3)
    twins.extend(twins.slots, [1, 1, 1], some_tokens(3))
    for t in ([NAN, NAN, NAN], [NAN, 1.0, 0.5], [NAN, NAN, NAN]):
        twins.denoise(twins.slots, [1, 1, 1], some_tokens(3), torch.tensor(t))


@pytest.mark.slow
def test_rows_of_a_long_context_are_split_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is launched kernel by kernel. The block after it is replayed, with its attention split into several
    items, and gives the same."""
    monkeypatch.setattr(attention_plan, "MIN_PAGES", 1)
    twins = Twins(slim(), 1)
    twins.extend(twins.slots, [100], some_tokens(100))
    if DEVICE == "cpu":
        assert twins.recorder.recorded == 0
    for length in (2, 1, 2):
        twins.denoise(twins.slots, [length], some_tokens(length), torch.tensor([0.5]))


class Failing(Recorder):
    """A recorder that always fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def record(self, run: Run) -> Run:  # noqa: ARG002
        self.recorded += 1
        raise self.error


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in fails")
def test_what_cannot_be_recorded_is_launched_kernel_by_kernel() -> None:
    """If recording fails, every forward is still right, the first one too, and there is one warning of one line. A lost
    device is an error."""
    no_memory = torch.OutOfMemoryError("CUDA out of memory\nadvice")
    twins = Twins(slim(), 1, record=Failing(no_memory))
    with pytest.warns(RuntimeWarning, match=r"^no CUDA graph for extend of 1 x 2 .*: CUDA out of memory$"):
        twins.extend(twins.slots, [2], some_tokens(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "invalid value")
        twins.extend(twins.slots, [2], some_tokens(2))
    assert twins.recorder.recorded == 1
    twins = Twins(slim(), 1, record=Failing(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        twins.extend(twins.slots, [1], some_tokens(1))


class Captures:
    """A stand-in for torch.cuda.CUDAGraph that notes what happened, in order."""

    def __init__(self) -> None:
        self.events = list[str]()

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        self.events.append(f"begin in {pool}, {capture_error_mode}")

    def capture_end(self) -> None:
        self.events.append("end")
        if "invalid" in self.events:
            raise RuntimeError("capture is invalid")

    def replay(self) -> None:
        self.events.append("replay")


def test_a_capture_that_fails_ends_and_tells_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed capture the stream no longer captures, and the first error is raised. A pool without a graph is
    not used again; one with a graph is."""
    pools, graph = iter(range(9)), Captures()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    record = CudaRecorder(torch.device("cuda", 1))

    def fail() -> None:
        graph.events.append("invalid")
        raise RuntimeError("waits for the device")

    for pool, replays in ((0, False), (1, True), (1, False), (1, True)):
        graph.events.clear()
        if replays:
            record(lambda: graph.events.append("run"))()
            assert graph.events == [f"begin in {pool}, thread_local", "run", "end", "replay"]
        else:
            with pytest.raises(RuntimeError, match="waits for the device"):
                record(fail)
            assert graph.events == [f"begin in {pool}, thread_local", "invalid", "end"]


@pytest.mark.slow
def test_more_slots_need_other_graphs() -> None:
    """Adding slots moves the cache's tensors; after clear() the new tensors are used."""
    twins = Twins(slim(), 1)
    twins.extend(twins.slots, [1], some_tokens(1))
    for cache in twins.caches:
        cache.add_slots(2)
        new = cache.allocator.acquire(PAGE_SIZE)
        assert new is not None
        slots = [new, *twins.slots]
    twins.graphs.clear()
    for _ in range(2):
        twins.extend(slots, [1, 1], some_tokens(2))


def test_forwards_that_fit_no_bucket_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards that fit no bucket are the model's own: prompts, contexts longer than the model allows, and one block
    among so many single tokens that most of the bucket is padding."""
    pair = slim()
    cache = pair.new_cache(slots=400, kv_tokens=200 * PAGE_SIZE)
    graphs = Graphs(pair, cache, Recorder())
    own = list[Part]()
    monkeypatch.setattr(pair, "extend_parts", lambda *_: own)
    monkeypatch.setattr(pair, "denoise_parts", lambda *_: own)

    def is_own(lengths: Sequence[int], context: int = 0) -> bool:
        count = len(lengths)
        rows = RaggedBatch(
            tuple(range(count)), (-1,) * count, tuple(lengths), (context,) * count, (range(129),) * count
        )
        found = {graphs.extend_parts(rows) is own, graphs.denoise_parts(rows, torch.ones(count)) is own}
        assert len(found) == 1
        return found.pop()

    assert is_own([BLOCK + 1])
    assert not is_own([BLOCK])
    assert is_own([16], SLIM.max_position_embeddings + 2 * PAGE_SIZE)
    assert not is_own([16], SLIM.max_position_embeddings - 16)
    assert not is_own([16] * 300)
    assert not is_own([16, *[1] * 14])
    assert is_own([16, *[1] * 300])


@on_a_gpu
def test_real_graphs_at_the_sizes_of_noise() -> None:
    """Forwards captured and replayed in float32 are right, on a stream like the engine's, with other memory allocated
    in between."""
    pair, draw = load_model("builtin:noise", devices=[DEVICE]), random.Random(0)
    twins = Twins(pair, 20, right=pair, kv_tokens=80 * PAGE_SIZE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            slots = draw.sample(twins.slots, draw.randint(17, 20))
            lengths = [draw.choice([16, 16, 7]) for _ in slots]
            t = torch.tensor([draw.choice([NAN, 0.25, 1.0]) for _ in slots])
            twins.denoise(slots, lengths, some_tokens(sum(lengths)), t)
            torch.full((draw.randint(1, 2**24),), torch.nan, device=DEVICE)
            twins.extend(slots, lengths, some_tokens(sum(lengths)))
            twins.denoise(slots, [1] * len(slots), some_tokens(len(slots)), torch.full((len(slots),), NAN))


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_gives_the_bits_of_the_same_kernels_launched(dtype: str) -> None:
    """Real graphs and the stand-in, each over its own cache, give the same bits at sizes at which experts have almost
    equal scores."""
    pair = load_model("builtin:noise", dtype, devices=[DEVICE])
    caches = [pair.new_cache(slots=20, kv_tokens=40 * PAGE_SIZE) for _ in range(2)]
    slots = [[cache.allocator.acquire(PAGE_SIZE) or 0 for _ in range(20)] for cache in caches]
    both = [Graphs(pair, caches[0]), Graphs(pair, caches[1], Recorder())]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (20, 19, 20, 3, 4, 19):
            lengths = [1 + i % 16 for i in range(count)] if count > 4 else [1] * count
            made = []
            for graphs, cache, of in zip(both, caches, slots, strict=True):
                rows, tokens = cache.rows(of[:count], lengths), some_tokens(sum(lengths))
                made.append(run(graphs.denoise_parts(rows, torch.full((count,), 0.5)), tokens))
                made.append(run(graphs.extend_parts(rows), tokens))
                cache.grow(rows)
            assert all(torch.equal(one, other) for one, other in zip(made[:2], made[2:], strict=True))
        assert all(torch.equal(one, other) for one, other in zip(*map(states, caches), strict=True))


@on_a_gpu
@pytest.mark.parametrize("case", golden.cases("denoise_logits"), ids=lambda case: case["id"])
def test_golden_logits_through_graphs(case: dict[str, Any]) -> None:
    """A forward gives the golden logits, the first time launched kernel by kernel, the second time replayed."""
    pair = load_model(str(golden.CHECKPOINT), devices=[DEVICE])
    assert pair.denoiser is not None
    cache = pair.new_cache(slots=3, kv_tokens=2048)
    graphs = Graphs(pair, cache)
    slot = cache.allocator.acquire(len(case["prompt_ids"]) + BLOCK)
    assert slot is not None
    pair.extend(cache, cache.rows([slot], [len(case["prompt_ids"])]), torch.tensor(case["prompt_ids"]))
    rows, stream = cache.rows([slot], [len(case["block"])]), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(2):
        with torch.cuda.stream(stream):
            hidden = run(graphs.denoise_parts(rows, torch.tensor([case["t"]])), torch.tensor(case["block"]))
        torch.cuda.synchronize()
        with torch.inference_mode():
            logits = pair.denoiser.logits(hidden)
        assert golden.relative_error(logits, golden.tensor(case["expected"]["logits"])) <= case["tolerance"]
