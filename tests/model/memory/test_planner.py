"""Tests the memory plan: forwards stay within it, what it refuses would not fit, and auto uses the memory that there
is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.network.tower
import model.network.two_tower
from model import EngineLimits, RequestError, TwoTower, load_model
from model.builtin.noise import CONFIG
from model.checkpoint.config import Towers, TwoTowerConfig, expected_tensors
from model.checkpoint.released import RELEASED_CONFIG
from model.memory import fit, workspace
from model.memory.fit import plan_for, stage_weights
from model.memory.plan import MemoryPlan
from model.memory.planner import AUTO_CONTEXT_TOKENS, AUTO_MAX_ROWS, BLOCK_TOKENS, KEPT_BACK, Planner, plan_memory
from model.network.context_cache import ContextCache
from model.network.layers.attention import AttentionState
from model.network.layers.mamba2 import MambaState
from model.network.partition import partition
from model.network.two_tower import Stage
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, pages_for
from tests.model.kernels.draws import choose_from, make_draws
from tests.model.memory.meter import MemoryMeter

pytestmark = pytest.mark.slow

GOLDEN = str(Path(__file__).parents[1] / "golden" / "checkpoint")
GIB = 2**30
H200, TWO_H100 = [139 * GIB], [80 * GIB, 80 * GIB]
WEIGHTS = (
    sum(torch.Size(shape).numel() for shape in expected_tensors(RELEASED_CONFIG).values()) * 2
)  # bytes in bfloat16


def released(total: int, gpus: int, limits: EngineLimits) -> MemoryPlan:
    """Return the plan for the released model on GPUs of `total` bytes each, with the layers in equal parts."""
    stages = [Stage(torch.device(f"cuda:{i}"), *ranges) for i, ranges in enumerate(partition(RELEASED_CONFIG, gpus))]
    names = [str(stage.device) for stage in stages]
    weights = dict.fromkeys(names, WEIGHTS // gpus)
    free = dict.fromkeys(names, total - WEIGHTS // gpus)
    return Planner(RELEASED_CONFIG, torch.bfloat16, stages, weights, free, limits).plan()


def needed(plan: MemoryPlan, rows: int, kv_tokens: int) -> list[int]:
    """Return the bytes that each device needs with the plan's workspace, computed independently of the plan."""
    return [
        device.states_per_row * (rows + PREFIX_SLOTS)
        + device.kv_per_token * pages_for(kv_tokens) * PAGE_SIZE
        + device.workspace
        + device.graphs
        + device.logits
        for device in plan.devices
    ]


def fits(plan: MemoryPlan) -> bool:
    wanted = needed(plan, plan.max_rows, plan.kv_tokens)
    return all(need <= device.free - device.kept_back for need, device in zip(wanted, plan.devices, strict=True))


def test_the_released_model_on_one_large_gpu_and_on_two() -> None:
    """The figures that follow from the config alone are right, and the planned rows fit on one large GPU and on two
    GPUs."""
    limits = EngineLimits(max_rows="auto", max_context_tokens=32768)
    one, two = (plan_for(RELEASED_CONFIG, torch.bfloat16, gpus, limits) for gpus in (H200, TWO_H100))
    assert one.devices[0].states_per_row == 23 * (6144 * 4 * 2 + 64 * 64 * 128 * 4)
    assert one.devices[0].kv_per_token == 6 * 2 * 2 * 128 * 2
    assert [sum(d.kv_per_token for d in plan.devices) for plan in (one, two)] == [6144, 6144]
    assert sum(d.states_per_row for d in two.devices) == one.devices[0].states_per_row
    assert [d.logits > 0 for d in two.devices] == [False, True]  # the head is on the last stage
    assert fits(one)
    assert fits(two)
    assert 192 <= one.max_rows <= two.max_rows == AUTO_MAX_ROWS["cuda"]
    assert min(one.kv_tokens // one.max_rows, two.kv_tokens // two.max_rows) >= AUTO_CONTEXT_TOKENS


@pytest.mark.parametrize(
    ("gpus", "rows", "context", "fit"),
    [
        (H200, "auto", 1024, 256),
        (TWO_H100, "auto", 4096, 256),
        (TWO_H100, 384, 1024, 384),
        (H200, 384, 1024, None),  # 17.7 GiB of states and 2.3 of keys and values beside 117.8 of weights
    ],
)
def test_rows_of_the_released_model_by_context(gpus: list[int], rows: Any, context: int, fit: int | None) -> None:
    limits = EngineLimits(max_rows=rows, max_context_tokens=context)
    if fit is None:
        with pytest.raises(RequestError, match=r"lower it to 3\d\d at most"):
            plan_for(RELEASED_CONFIG, torch.bfloat16, gpus, limits)
        return
    plan = plan_for(RELEASED_CONFIG, torch.bfloat16, gpus, limits)
    assert (plan.max_rows, plan.kv_tokens) == (fit, fit * context)
    assert fits(plan)


@pytest.mark.parametrize(("rows", "held"), [(16, 16 * 32 * 131_072 * 2), (256, GIB)])
def test_a_gpu_holds_all_logits_of_a_lane_up_to_a_gibibyte(rows: int, held: int) -> None:
    """The plan counts the bfloat16 logits of all rows of a lane, a block of 32 tokens each, but one GiB at most."""
    limits = EngineLimits(max_rows=rows, max_context_tokens=1024)
    assert plan_for(RELEASED_CONFIG, torch.bfloat16, H200, limits).devices[0].logits == held


@pytest.mark.parametrize("towers", ["both", "context"])
def test_weights_that_are_not_there_are_weighed_as_if_they_were(towers: Towers) -> None:
    """The planned bytes of weights are exact, including the router's weights in float64. Weights that every stage holds
    count on each device."""
    pair = load_model("builtin:noise", "bfloat16", devices=["cpu"] * 3, towers=towers)
    names = ["cuda:0", "cuda:1", "cuda:2"]
    weights, stages = stage_weights(pair.config, torch.bfloat16, names, towers)
    assert sum(weights) == sum(tensor.nbytes for tensor in (*pair.parameters(), *pair.buffers()))
    assert [str(stage.device) for stage in stages] == names
    assert [(stage.context, stage.denoiser) for stage in stages] == [(s.context, s.denoiser) for s in pair.stages]
    assert max(weights) < 2 * min(weights)


def test_the_command_prints_the_plan_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    fit.main(["--devices", "80,80", "--max-rows", "64", "--context", "4096"])
    assert capsys.readouterr().out.splitlines()[-1] == "max_rows 64, kv_tokens 262,144"
    with pytest.raises(SystemExit, match=r"error: cuda:0 has 48\.0 GiB, but its share of the weights takes 117\.8 GiB"):
        fit.main(["--devices", "48"])
    with pytest.raises(SystemExit, match="error: max_rows is 0: it must be"):
        fit.main(["--devices", "139", "--max-rows", "0"])


@settings(max_examples=150, deadline=None)
@given(
    free=st.integers(0, 40 * GIB),
    gpus=st.integers(1, 4),
    context=st.sampled_from([64, 1000, 4096, 131072]),
    prefill=st.sampled_from([64, 4096, 16384]),
    lanes=st.none() | st.integers(1, 3),
)
def test_auto_fits_and_one_row_more_would_not(
    free: int, gpus: int, context: int, prefill: int, lanes: int | None
) -> None:
    """With any amount of memory, an auto plan fits and holds a whole context. One row more would not fit unless the
    rows are at their cap."""

    def plan(rows: int | str) -> MemoryPlan:
        limits = EngineLimits(
            max_rows=rows,  # type: ignore[arg-type]
            max_context_tokens=context,
            max_prefill_tokens=prefill,
            lanes=lanes,
        )
        return released(free + WEIGHTS // gpus, gpus, limits)

    try:
        auto = plan("auto")
    except RequestError:
        with pytest.raises(RequestError):
            plan(lanes or 1)
        return
    assert fits(auto)
    assert pages_for(context) * PAGE_SIZE <= auto.kv_tokens <= auto.max_rows * pages_for(context) * PAGE_SIZE
    if auto.max_rows < AUTO_MAX_ROWS["cuda"]:
        usual = pages_for(min(context, AUTO_CONTEXT_TOKENS)) * PAGE_SIZE
        try:
            more = plan(auto.max_rows + 1)
        except RequestError:
            return
        assert more.kv_tokens < (auto.max_rows + 1) * usual


@settings(max_examples=100, deadline=None)
@given(free=st.integers(4 * GIB, 40 * GIB), rows=st.integers(1, 2000))
def test_rows_that_are_given_fit_or_the_refusal_names_the_most_that_do(free: int, rows: int) -> None:
    """The number of rows that the message names is exact: that many fit, and one more does not."""

    def plan(rows: int) -> MemoryPlan:
        return released(free + WEIGHTS, 1, EngineLimits(max_rows=rows, max_context_tokens=8192))

    try:
        assert fits(plan(rows))
    except RequestError as error:
        words = str(error).split()
        if "lower it to" not in str(error):
            with pytest.raises(RequestError, match="no memory for one row of 8,192 tokens"):
                plan(1)
            return
        most = int(words[words.index("to") + 1])
        assert most < rows
        assert fits(plan(most))
        with pytest.raises(RequestError, match=rf"lower it to {most} at most, .*: cuda:0 has .* free"):
            plan(most + 1)


def test_the_tightest_device_decides() -> None:
    """Two GPUs hold fewer rows if one of them is nearly full, whichever it is, and a refusal names that GPU."""
    limits = EngineLimits(max_rows="auto", max_context_tokens=8192)
    stages = [Stage(torch.device(f"cuda:{i}"), *ranges) for i, ranges in enumerate(partition(RELEASED_CONFIG, 2))]

    def rows(*free: int) -> int:
        names = {f"cuda:{i}": count for i, count in enumerate(free)}
        return Planner(RELEASED_CONFIG, torch.bfloat16, stages, {}, names, limits).plan().max_rows

    assert rows(5 * GIB, 30 * GIB) < rows(30 * GIB, 30 * GIB)
    assert rows(30 * GIB, 5 * GIB) < rows(30 * GIB, 30 * GIB)
    with pytest.raises(RequestError, match=r"^no memory for one row .*: cuda:1 has 512 MiB free"):
        rows(30 * GIB, 2**29)


def test_given_context_tokens_are_kept_or_refused() -> None:
    """A given kv_tokens is kept, and the number of rows follows from it. If it does not fit, the refusal names the
    settings and the device."""
    given_plan = released(139 * GIB, 1, EngineLimits(max_rows="auto", kv_tokens=10 * AUTO_CONTEXT_TOKENS))
    assert (given_plan.max_rows, given_plan.kv_tokens) == (10, 10 * AUTO_CONTEXT_TOKENS)
    with pytest.raises(RequestError, match=r"engine.max_rows 7 and engine.kv_tokens 1000000000; lower them: cuda:0"):
        released(139 * GIB, 1, EngineLimits(max_rows=7, kv_tokens=10**9))
    limits = EngineLimits(max_rows=3, kv_tokens=200, max_context_tokens=128)
    assert released(139 * GIB, 1, limits).kv_tokens == 200


def test_too_few_rows_for_the_lanes_are_refused() -> None:
    """Fewer rows than lanes are refused. With auto, the number of rows is known only when the plan is made."""
    with pytest.raises(RequestError, match=r"engine\.lanes is 300, but engine\.max_rows auto comes to 256"):
        released(400 * GIB, 1, EngineLimits(max_rows="auto", lanes=300, max_context_tokens=64))


@pytest.fixture(scope="module", params=["builtin:noise", GOLDEN], ids=["tiny", "golden"])
def pair(request: pytest.FixtureRequest) -> TwoTower:
    return load_model(request.param)


def test_a_loaded_model_is_planned_on_its_own_device(pair: TwoTower) -> None:
    """The planned bytes of weights, states and pages are exactly those of a loaded model, with the row cap and the
    margin of a CPU."""
    plan = plan_memory(pair, EngineLimits(max_rows="auto", max_context_tokens=500), free={"cpu": GIB})
    assert plan.max_rows == AUTO_MAX_ROWS["cpu"]
    assert plan.kv_tokens == plan.max_rows * 512
    device = plan.devices[0]
    assert (device.free, device.kept_back) == (GIB, int(GIB * KEPT_BACK["cpu"]))
    assert device.weights == sum(parameter.nbytes for parameter in pair.parameters())
    cache = pair.new_cache(slots=plan.max_rows + PREFIX_SLOTS, kv_tokens=plan.kv_tokens)
    states = sum(s.conv.nbytes + s.ssm.nbytes for s in cache.layers if isinstance(s, MambaState))
    pages = sum(s.pages.nbytes for s in cache.layers if isinstance(s, AttentionState))
    fixed = device.fixed(plan.max_rows) - device.workspace - device.logits
    assert (fixed, plan.kv_tokens * device.kv_per_token) == (states, pages)
    assert device.left(plan.max_rows, plan.kv_tokens) == GIB - states - pages - device.workspace - device.logits


def test_stages_on_one_device_are_summed() -> None:
    """Two stages on the CPU are one line of the plan, with the same states as one stage and with both workspaces,
    because both may run at the same time."""
    limits = EngineLimits(max_rows=4, lanes=1)
    one = plan_memory(load_model(GOLDEN), limits, free={"cpu": GIB}).devices
    two = plan_memory(load_model(GOLDEN, devices=["cpu", "cpu"]), limits, free={"cpu": GIB}).devices
    assert len(two) == 1
    assert (two[0].states_per_row, two[0].kv_per_token) == (one[0].states_per_row, one[0].kv_per_token)
    assert one[0].workspace < two[0].workspace <= 2 * one[0].workspace


def test_the_table_can_be_read() -> None:
    """The table has one line for each device, with units, and the result in its last line."""
    lines = released(80 * GIB, 2, EngineLimits(max_rows=64, max_context_tokens=8192)).lines()
    assert len(lines) == 4
    assert lines[0].split()[:2] == ["device", "weights"]
    assert lines[1].split()[:3] == ["cuda:0", f"{WEIGHTS / 2 / GIB:.1f}", "GiB"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == "max_rows 64, kv_tokens 524,288"


@pytest.mark.parametrize(
    ("rows", "prefill", "context", "lanes"), [(4, 256, 256, 1), (16, 1024, 512, 2), (3, 2048, 1024, 1), (24, 64, 64, 1)]
)
def test_forwards_stay_within_the_planned_workspace(
    pair: TwoTower, rows: int, prefill: int, context: int, lanes: int
) -> None:
    """Measured peaks of live bytes stay below the planned workspace. The largest is more than a quarter of it, so the
    plan is not far too high."""
    limits = EngineLimits(max_rows=rows, max_prefill_tokens=prefill, max_context_tokens=context, lanes=lanes)
    plan = plan_memory(pair, limits, free={"cpu": GIB})
    cache = pair.new_cache(slots=rows, kv_tokens=plan.kv_tokens)
    slots = [cache.allocator.acquire(context) or 0 for _ in range(rows)]
    room = context - BLOCK_TOKENS
    at_once, peaks = max(1, min(rows, prefill // room)), []
    with torch.inference_mode():
        for first in range(0, rows, at_once):
            some = slots[first : first + at_once]
            while (left := room - cache.allocator.length(some[0])) > 0:
                longest = min(left, prefill // len(some))
                peaks.append(_extend(pair, cache, some, [longest] * len(some)))
        lane = slots[: -(-rows // lanes)]
        batch = cache.rows(lane, [BLOCK_TOKENS - i % 3 for i in range(len(lane))])
        with MemoryMeter() as meter:
            pair.denoise(cache, batch, torch.full((sum(batch.lengths),), 3), torch.linspace(0, 1, len(lane)))
        peaks.append(meter.peak)
        peaks.append(_extend(pair, cache, lane, list(batch.lengths)))
        cache = pair.new_cache(slots=len(lane) + at_once, kv_tokens=PAGE_SIZE * (len(lane) + at_once * (context + 64)))
        slots = [cache.allocator.acquire(tokens) or 0 for tokens in [room] * at_once + [BLOCK_TOKENS] * len(lane)]
        pieces = [min(room, prefill // at_once)] * at_once  # pieces of prompts beside the blocks of a lane
        peaks.append(_extend(pair, cache, slots, pieces + [BLOCK_TOKENS] * len(lane)))
    assert plan.devices[0].workspace / 4 < max(peaks) < plan.devices[0].workspace, peaks


def test_forwards_with_the_kernels_of_a_gpu_stay_within_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of a GPU, extends of prompts beside blocks stay within the planned workspace, and denoiser
    forwards within the planned memory of CUDA graphs.

    The kernels themselves are not run, because they allocate nothing. Their outputs are zeros or whatever the memory
    held.
    """
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("measures on a CPU, where kernels are interpreted")
    from triton.runtime.interpreter import GridExecutor

    from model.kernels.triton import attention_plan
    from model.kernels.triton import kernels as cuda

    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)

    kernels = cuda.CudaKernels()
    kernels._prefill_scan = None  # needs a GPU
    for module in (model.network.tower, model.network.two_tower):
        monkeypatch.setattr(module, "kernels_for", lambda _: kernels)
    for module in (attention_plan, workspace):
        monkeypatch.setattr(module, "PROGRAMS", 4)
    config = replace(TwoTowerConfig.from_dict(dict(CONFIG)), layer_kinds=("mamba", "attention", "moe"))
    pair = TwoTower(config, torch.bfloat16, [torch.device("cpu")])
    for weight in pair.parameters():
        weight.zero_()
    monkeypatch.setattr(torch, "empty", torch.zeros)  # later operations need valid indices
    rows, limits = 4, EngineLimits(max_rows=4, max_prefill_tokens=64, max_context_tokens=256)
    stage = Stage(torch.device("cuda:0"), range(3), range(3))
    device = Planner(config, torch.bfloat16, [stage], {}, {"cuda:0": GIB}, limits).plan().devices[0]
    cache = pair.new_cache(slots=rows + 1, kv_tokens=128 * rows + 64)
    slots = [cache.allocator.acquire(128) or 0 for _ in range(rows)]
    with torch.inference_mode():
        _extend(pair, cache, slots, [33] * rows)
        extended = _extend(pair, cache, [*slots, cache.allocator.acquire(64) or 0], [BLOCK_TOKENS] * rows + [64])
        batch = cache.rows(slots, [BLOCK_TOKENS] * rows)
        with MemoryMeter() as meter:
            pair.denoise(cache, batch, torch.full((rows * BLOCK_TOKENS,), 3), torch.full((rows,), 0.5))
    assert device.workspace / 8 < extended < device.workspace
    assert device.graphs / 4 < meter.peak < device.graphs


def _extend(pair: TwoTower, cache: ContextCache, slots: list[int], lengths: list[int]) -> int:
    """Return the peak of live bytes of an extend forward."""
    batch = cache.rows(slots, lengths)
    meter = MemoryMeter()
    with meter:
        pair.extend(cache, batch, torch.full((sum(lengths),), 5))
    return meter.peak


def test_choosing_tokens_stays_within_the_planned_logits(pair: TwoTower) -> None:
    """The head and the choice of tokens stay within the planned logits, even if all rows are sampled with limits, which
    needs the most memory."""
    plan = plan_memory(pair, EngineLimits(max_rows=4), free={"cpu": GIB})
    count = 4 * BLOCK_TOKENS
    draws = make_draws(
        temperature=torch.ones(count),
        top_k=torch.full((count,), 5),
        top_p=torch.full((count,), 0.9, dtype=torch.float64),
        key=torch.zeros(count, 2, dtype=torch.int64),
        counter=torch.zeros(count, 3, dtype=torch.int64),
    )
    logits = torch.randn(count, pair.config.vocab_size, generator=torch.Generator().manual_seed(0))
    with MemoryMeter() as meter:
        choose_from(logits, torch.ones(count, dtype=torch.bool), draws)
    assert plan.devices[0].logits / 8 < meter.peak < plan.devices[0].logits
