"""Tests that batching changes the speed of rows and never their tokens, in any mix of rows, with any limits and on any
devices.

In float32 on a CPU the results are equal bit by bit, confidences included.
"""

import dataclasses
import random
from functools import cache

import pytest
import torch

from model import Completion, Engine, EngineLimits, GenerationParams, Request, load_model
from model.network.two_tower import TwoTower
from tests.model.engine.test_engine import drain, outcome, prompt, random_requests
from tests.model.golden_cases import CHECKPOINT
from tests.model.memory.meter import MemoryMeter

pytestmark = pytest.mark.slow

NOISE = "builtin:noise"
MIXES = {NOISE: 40, str(CHECKPOINT): 60}


@cache
def model(uri: str, stages: int = 1) -> TwoTower:
    return load_model(uri, devices=["cpu"] * stages)


@cache
def pool(uri: str) -> list[Request]:
    """Return requests of all modes and settings, greedy and sampled, some of them with the same first 140 tokens."""
    vocabulary = model(uri).config.vocab_size
    shared = [4 + token % (vocabulary - 4) for token in prompt(140, 9)]
    rng, requests = random.Random(6), list[Request]()
    for i, request in enumerate(random_requests(48, seed=5)):
        own = [4 + token % (vocabulary - 4) for token in prompt(rng.choice([1, 2, 17, 40, 130]), i)]
        ids, prefix = (shared + own, 140) if i % 4 == 0 else (own, 0)
        params = dataclasses.replace(request.params, max_new_tokens=rng.choice([3, 16, 20]))
        if params.mode != "diffusion":
            params = dataclasses.replace(params, max_new_tokens=5)
        elif i % 4 and i % 3 == 1:  # the row grows into its second and third page
            params = dataclasses.replace(params, max_new_tokens=90, steps_per_block=1)
        requests.append(Request(request.key, ids, params, prefix_tokens=prefix))
    return requests


@cache
def alone(uri: str) -> dict[str, tuple[object, ...]]:
    """Return the outcome of each request by itself, with its prompt in one piece and without shared prefixes."""
    engine = Engine(model(uri), EngineLimits(max_rows=1))
    return {r.key: outcome(engine.generate([dataclasses.replace(r, prefix_tokens=0)])[0]) for r in pool(uri)}


@pytest.mark.parametrize("uri", [NOISE, str(CHECKPOINT)], ids=["noise", "golden"])
def test_a_row_gives_the_same_in_any_mix(uri: str) -> None:
    """A row gives the same tokens with random other rows, arrivals, limits, lanes and stages. Rows are submitted while
    others run, and pages sometimes run out."""
    rng = random.Random(12)
    preemptions = shared = 0
    sampled = {request.params.temperature > 0 for request in pool(uri)}
    assert sampled == {True, False}
    for mix in range(MIXES[uri]):
        requests = rng.sample(pool(uri), rng.randint(2, 5))
        rows, stages = rng.randint(1, 8), rng.choice([1, 1, 2, 3])
        limits = EngineLimits(
            max_rows=rows,
            max_prefill_tokens=rng.choice([64, 100, 256, 4096]),
            max_context_tokens=320,
            kv_tokens=rng.choice([320, 320, 4096]),
            lanes=rng.randint(1, min(rows, 3)),
            extend_every=rng.choice([1, 1, 2, 4]),
        )
        # GPU settings: several tokens a turn in AR mode, extends launched before denoiser forwards are collected
        ar_tokens, overlap = rng.choice([1, 4]) if stages == 1 else 1, rng.choice([None, 1, 2])
        engine = Engine(model(uri, stages), limits, ar_tokens=ar_tokens, overlap_rows=overlap)
        done: dict[str, Completion] = {}
        for request in requests:
            engine.submit(request)
            if rng.random() < 0.4:
                done |= {completion.key: completion for completion in engine.step()}
        done |= drain(engine)
        assert {key: outcome(c) for key, c in done.items()} == {r.key: alone(uri)[r.key] for r in requests}, (
            mix,
            limits,
        )
        preemptions += engine.stats.preemptions
        shared += engine.stats.shared_tokens
    assert preemptions > 0  # both paths were taken
    assert shared > 50 * MIXES[uri]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_and_lanes_change_nothing(stages: int, lanes: int) -> None:
    """One to three stages on CPU devices and one or two lanes give the same tokens for every request of the pool."""
    engine = Engine(model(NOISE, stages), EngineLimits(max_rows=8, lanes=lanes))
    got = engine.generate(pool(NOISE))
    engine.check()
    assert {c.key: outcome(c) for c in got} == alone(NOISE)


def test_a_long_prompt_does_not_stop_the_others() -> None:
    """While a prompt of 3,000 tokens is read in pieces of 256, rows beside it end. Its own result is that of a prompt
    read in one piece."""
    long = Request("long", prompt(3000, 5), GenerationParams(max_new_tokens=20))
    short = [Request(f"r{i}", prompt(20, i), GenerationParams(mode="ar", max_new_tokens=3)) for i in range(6)]
    whole = outcome(Engine(model(NOISE), EngineLimits(max_prefill_tokens=4096)).generate([long])[0])
    engine = Engine(model(NOISE), EngineLimits(max_rows=2, max_prefill_tokens=256))
    for request in [long, *short]:
        engine.submit(request)
    ended = []
    while engine.scheduler.running.get("long") is None or engine.scheduler.running["long"].lane is None:
        ended += [completion.key for completion in engine.step()]
    assert len(ended) >= 2
    done = drain(engine)
    assert outcome(done["long"]) == whole
    assert {*ended, *done} == {"long", *(request.key for request in short)}


def test_a_prefix_is_computed_once_and_kept() -> None:
    """In two rounds of rows that begin with the same 200 tokens, the 192 tokens that fill whole pages are computed only
    once."""
    shared = prompt(200, 3)
    requests = [
        Request(f"r{i}", shared + prompt(i, i), GenerationParams(max_new_tokens=5), prefix_tokens=200)
        for i in range(10)
    ]
    engine = Engine(model(NOISE), EngineLimits(max_rows=3))
    got = engine.generate(requests[:5]) + engine.generate(requests[5:])
    engine.check()
    plain = Engine(model(NOISE)).generate([dataclasses.replace(request, prefix_tokens=0) for request in requests])
    assert [outcome(c) for c in got] == [outcome(c) for c in plain]
    assert engine.stats.prefill_tokens == 192 + sum(len(request.prompt_ids) - 192 for request in requests)
    assert engine.stats.shared_tokens == 10 * 192


def test_when_pages_run_out_the_youngest_row_starts_again() -> None:
    """If rows grow beyond the free pages, some are preempted. All end with the same tokens and report how often they
    were preempted."""
    requests = [Request(f"r{i}", prompt(100, i), GenerationParams(max_new_tokens=150)) for i in range(6)]
    wide = [outcome(c) for c in Engine(model(NOISE), EngineLimits(max_rows=6)).generate(requests)]
    engine = Engine(model(NOISE), EngineLimits(max_rows=6, kv_tokens=14 * 64, max_context_tokens=300))
    for request in requests:
        engine.submit(request)
    done = drain(engine)
    assert [outcome(done[request.key]) for request in requests] == wide
    assert sum(c.preemptions for c in done.values()) == engine.stats.preemptions > 0
    assert done["r0"].preemptions == 0  # the oldest row is never preempted


@pytest.mark.parametrize("stages", [1, 2])
def test_cancelled_rows_leave_nothing_behind(stages: int) -> None:
    """A row that is cancelled while it waits, reads its prompt or generates is gone at once, and other rows use its
    slot."""
    requests = [Request(f"r{i}", prompt(300, i), GenerationParams(max_new_tokens=40)) for i in range(8)]
    engine = Engine(model(NOISE, stages), EngineLimits(max_rows=3, max_prefill_tokens=128))
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    for steps, key in ((0, "r7"), (1, "r0"), (2, "r1"), (6, "r2")):
        for _ in range(steps):
            done |= {completion.key: completion for completion in engine.step()}
        assert engine.cancel(key)
        assert not engine.cancel(key)
        engine.check()
    done |= drain(engine)
    assert sorted(done) == ["r3", "r4", "r5", "r6"]
    wanted = Engine(model(NOISE)).generate(requests[3:7])
    assert [outcome(done[c.key]) for c in wanted] == [outcome(c) for c in wanted]
    engine.submit(requests[0])
    assert list(drain(engine)) == ["r0"]


def test_more_and_fewer_rows_while_running() -> None:
    """If max_rows changes from 2 to 5 and to 1, as many rows run as are allowed, rows in slots end first, and no row is
    lost or changed."""
    requests = [Request(f"r{i}", prompt(20, i), GenerationParams(max_new_tokens=60)) for i in range(12)]
    engine = Engine(model(NOISE), EngineLimits(max_rows=2))
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    seen: list[int] = []
    for limit in (2, 5, 1):
        engine.set_max_rows(limit)
        for _ in range(4):
            done |= {completion.key: completion for completion in engine.step()}
            engine.check()
        seen.append(engine.active)
    assert seen[:2] == [2, 5]
    most = seen[2]
    while engine.waiting or engine.active:
        done |= {completion.key: completion for completion in engine.step()}
        assert engine.active <= max(1, most)
        most = min(most, max(1, engine.active))
    wanted = Engine(model(NOISE)).generate(requests)
    assert [outcome(done[c.key]) for c in wanted] == [outcome(c) for c in wanted]


def test_pieces_bound_the_memory_of_a_long_prompt() -> None:
    """A prompt of 5,000 tokens that is read in pieces of 256 needs less than a quarter of the memory, beside the cache,
    that it needs in one piece."""
    peaks = {}
    for budget in (256, 8192):
        engine = Engine(model(NOISE), EngineLimits(max_rows=1, max_prefill_tokens=budget))
        with MemoryMeter() as meter:
            engine.generate([Request("long", prompt(5000, 1), GenerationParams(max_new_tokens=1))])
        peaks[budget] = meter.peak
    assert peaks[256] < peaks[8192] / 4


def test_only_hidden_states_pass_from_stage_to_stage() -> None:
    """In either tower, a stage hands the next one a single tensor of (tokens, hidden size) in the model's dtype."""
    pair = model(NOISE, 3)
    context = pair.new_cache(slots=2, kv_tokens=256)
    slots = [slot for _ in range(2) if (slot := context.allocator.acquire(64)) is not None]
    rows = context.rows(slots, [16, 16])
    tokens = torch.tensor(prompt(32, 1))
    for parts in (pair.extend_parts(context, rows), pair.denoise_parts(context, rows, torch.tensor([1.0, 0.5]))):
        x = tokens
        with torch.inference_mode():
            for part in parts:
                x = part(x)
                assert isinstance(x, torch.Tensor)
                assert (x.shape, x.dtype) == ((32, pair.config.hidden_size), pair.dtype)
