"""Tests the stages of a model: threads on a CPU; on CUDA streams, whose work may run in any order that the waits allow.

Without a GPU the order is simulated (tests.model.runtime.simulated_cuda).
"""

import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Engine, EngineLimits, RequestError, load_model
from model.requests import Request
from model.runtime.stages import Flight, Part, Stages
from tests.model.engine.test_engine import outcome, random_requests
from tests.model.runtime.simulated_cuda import CUDA0, SimulatedCuda
from tests.waiting import PATIENCE_S

CUDA1 = torch.device("cuda:1")
LAYOUTS = [(CUDA0,), (CUDA0, CUDA0), (CUDA0, CUDA1), (CUDA0, CUDA1, CUDA0), (CUDA0, CUDA0, CUDA1, CUDA1)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def mixed(a: int, b: int) -> int:
    """Return a number that differs for every pair of numbers, and for the same pair in the other order."""
    return (a * 1_000_003 + b * 8191 + 17) % (2**61 - 1)


class Towers:
    """Parts of forwards that read and write a state of their stage, as a tower does with its cache.

    Their results go into new memory or into buffers that are used again. The expected results are those of forwards
    that run one after the other.
    """

    def __init__(self, cuda: SimulatedCuda, devices: Sequence[torch.device]) -> None:
        self.cuda, self.devices = cuda, devices
        self.values = [7 + stage for stage in range(len(devices))]
        self.states, self.buffers = [], []
        for value, device in zip(self.values, devices, strict=True):
            with cuda.use(cuda.stream(device)):  # weights, too, are loaded on a stream of their own
                self.states.append(cuda.compute(lambda v=value: v))
                self.buffers.append(cuda.compute(lambda: 0))
        self.stages = Stages(devices, cuda)  # type: ignore[arg-type]
        self.launched: list[tuple[Flight, int]] = []

    def part(self, stage: int, in_buffer: bool, fails: bool) -> Part:
        def run(x):  # type: ignore[no-untyped-def]
            cuda, state = self.cuda, self.states[stage]
            assert cuda.device == self.devices[stage]
            between = cuda.compute(mixed, x, state)
            cuda.compute(mixed, state, between, out=state)
            if fails:
                raise RuntimeError("no room")
            return cuda.compute(mixed, between, state, out=self.buffers[stage] if in_buffer else None)

        return run

    def launch(self, start: int, in_buffer: bool = False, fails: bool = False) -> None:
        expected = start
        for stage, state in enumerate(self.values):
            between = mixed(expected, state)
            self.values[stage] = mixed(state, between)
            expected = mixed(between, self.values[stage])
        last = len(self.devices) - 1
        parts = [self.part(stage, in_buffer and stage < last, fails and stage == last) for stage in range(last + 1)]
        self.launched.append((self.stages.launch(parts, start), expected))

    def move_states(self) -> None:
        """Copy the states outside the stages, while no forward is in progress, as adding slots does."""
        for stage, device in enumerate(self.devices):
            self.states[stage] = self.cuda.compute(lambda v: v, self.states[stage], device=device)

    def collect(self) -> bool:
        """Return whether the oldest forward gave what was expected."""
        flight, expected = self.launched.pop(0)
        return self.cuda.value(flight.result()) == expected


@settings(max_examples=100)
@given(
    st.sampled_from(LAYOUTS),
    st.lists(st.sampled_from(["new", "buffer", "collect", "move"]), max_size=16),
    st.integers(),
)
def test_any_order_that_the_waits_allow_gives_the_same(layout: list[torch.device], acts: list[str], seed: int) -> None:
    """In any order that the waits allow, forwards give what they give one after the other: with new memory or reused
    buffers, some collected early, and with states moved in between."""
    towers = Towers(SimulatedCuda(seed), layout)
    for i, act in enumerate(acts):
        if act in ("new", "buffer"):
            towers.launch(i, act == "buffer")
        elif act == "collect" and towers.launched:
            assert towers.collect()
        elif act == "move":
            while towers.launched:
                assert towers.collect()
            towers.move_states()
    while towers.launched:
        assert towers.collect()


@pytest.mark.parametrize("layout", [(CUDA0, CUDA0), (CUDA0, CUDA1)], ids=["one device", "two devices"])
@pytest.mark.parametrize("broken", ["wait_event", "wait_stream", "record_stream", "copy"])
def test_the_simulation_finds_what_is_missing(broken: str, layout: Sequence[torch.device]) -> None:
    """The simulation notices if a wait, the copy or record_stream is left out: some order then gives another result."""
    if broken == "copy" and layout[0] != layout[1]:
        pytest.skip("a copy between devices cannot be left out")

    def right(seed: int) -> bool:
        towers = Towers(SimulatedCuda(seed, (broken,)), layout)
        for i in range(6):
            towers.launch(i, in_buffer=broken == "copy")
        try:
            good = [towers.collect() for _ in range(6)]
            towers.move_states()
            towers.launch(9)
            return all([*good, towers.collect()])
        except RuntimeError:  # an event that should be done is not done
            return False

    assert not all(right(seed) for seed in range(100))


@pytest.mark.parametrize(
    "layout", [(CUDA0, CUDA0), (CUDA0, CUDA1), (CUDA0, CUDA1, CUDA0)], ids=["one device", "two", "there and back"]
)
def test_no_stage_waits_for_a_later_one(layout: Sequence[torch.device]) -> None:
    """The host launches six forwards without waiting. While the second stage stands still, the first one computes all
    six."""
    cuda = SimulatedCuda(1)
    towers = Towers(cuda, layout)
    waits = cuda.host_waits
    for i in range(6):
        towers.launch(i, in_buffer=i % 2 == 0)
    assert cuda.host_waits == waits
    second = towers.stages._streams._streams[1]  # type: ignore[union-attr]
    cuda.run(frozen=(second,))  # type: ignore[arg-type]
    assert cuda.value(towers.states[0]) == towers.values[0]
    assert cuda.value(towers.states[1]) != towers.values[1]
    assert all(towers.collect() for _ in range(6))


def test_a_failed_part_is_told_by_its_result_alone() -> None:
    """A failed part raises only in the result of its own forward, once everything that was launched is done. The
    forwards before and after it give correct results."""
    cuda = SimulatedCuda(2)
    towers = Towers(cuda, (CUDA0, CUDA1))
    before = cuda.device, cuda.current(CUDA0), cuda.current(CUDA1)

    towers.launch(1)
    towers.launch(5, fails=True)
    flight, _ = towers.launched.pop()
    with pytest.raises(RuntimeError, match="no room"):
        flight.result()
    assert [cuda.value(state) for state in towers.states] == towers.values
    towers.launch(3)
    assert towers.collect()
    assert towers.collect()
    assert (cuda.device, cuda.current(CUDA0), cuda.current(CUDA1)) == before


def test_an_error_of_the_device_is_raised_by_the_result() -> None:
    cuda = SimulatedCuda(3)
    towers = Towers(cuda, (CUDA0,))
    towers.launch(1)
    cuda.fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        towers.collect()
    del towers  # raises nothing


def test_seconds_are_those_of_the_parts() -> None:
    """The seconds of a forward are those of its parts: 5 ms and 7 ms, without the 100 ms for which other work kept the
    second device busy."""

    def part(cuda: SimulatedCuda, ms: float) -> Part:
        def run(x):  # type: ignore[no-untyped-def]
            cuda.sleep(ms)
            return x

        return run

    for seed in range(20):
        cuda = SimulatedCuda(seed)
        stages = Stages([CUDA0, CUDA1], cuda)  # type: ignore[arg-type]
        with cuda.use(cuda.current(CUDA1)):
            cuda.sleep(100)
        flight = stages.launch([part(cuda, 5), part(cuda, 7)], 1)
        flight.result()
        assert flight.seconds == pytest.approx(0.012)


def test_what_is_under_way_is_done_when_the_stages_are_gone() -> None:
    """Forwards in progress finish before the stages are gone, so that nothing writes to memory that has a new owner."""
    cuda = SimulatedCuda(5)
    towers = Towers(cuda, (CUDA0, CUDA1))
    towers.launch(1)
    states, values = towers.states, towers.values
    del towers
    assert [cuda.value(state) for state in states] == values


def test_devices_of_two_kinds_are_refused() -> None:
    with pytest.raises(RequestError, match="devices are cpu, cuda:0: all must be 'cpu', or all 'cuda:N'"):
        Stages([torch.device("cpu"), CUDA0])


def test_threads_overlap_and_keep_the_order() -> None:
    """On a CPU, the second forward passes the first stage while the first forward is still in the second stage."""
    passed, order = threading.Event(), list[str]()

    def first(x: str) -> str:
        if x == "b":
            passed.set()
        return x

    def second(x: str) -> str:
        assert passed.wait(PATIENCE_S)
        order.append(x)
        return x * 2

    stages = Stages([torch.device("cpu")] * 2)
    flights = [stages.launch([first, second], x) for x in "ab"]
    assert [flight.result() for flight in flights] == ["aa", "bb"]
    assert order == ["a", "b"]
    assert all(flight.seconds > 0 for flight in flights)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("count", [1, 2, 3])
def test_real_streams(count: int) -> None:
    """Real streams give the same results as one stream, although the device is slow and the host is far ahead. Each
    stage has a product, a state and a buffer."""
    devices = [torch.device("cuda", i % torch.cuda.device_count()) for i in range(count)]
    start = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def towers() -> list[Part]:
        states = [torch.eye(256, dtype=torch.float64, device=d) for d in devices]
        buffers = [torch.empty_like(state) for state in states]

        def part(stage: int) -> Part:
            def run(x: torch.Tensor) -> torch.Tensor:
                torch.cuda._sleep(20_000_000)
                states[stage].mul_(0.5).add_(x @ states[stage]).div_(states[stage].abs().max())
                if stage < count - 1:
                    return torch.add(x, states[stage], out=buffers[stage])
                return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x + states[stage], non_blocking=True)

            return run

        return [part(stage) for stage in range(count)]

    together, alone = towers(), towers()
    stages = Stages(devices)
    flights = [stages.launch(together, start + i) for i in range(8)]
    assert not flights[-1]._marks[-1][1].query()  # the host launched it and did not wait for it
    for i, flight in enumerate(flights):
        x = (start + i).to(devices[0])
        for part, device in zip(alone, devices, strict=True):
            with torch.cuda.device(device):
                x = part(x.to(device))
        torch.cuda.synchronize(devices[-1])
        assert torch.equal(flight.result(), x)
        assert 0 < flight.seconds < 60


@needs_gpu
@pytest.mark.parametrize("lanes", [1, 2])
def test_two_stages_on_a_gpu_give_what_one_does(lanes: int) -> None:
    """Two stages give the same as one: on one device with a stream each, and on two devices if there are two."""
    requests: list[Request] = random_requests(24, seed=5)
    limits = EngineLimits(max_rows=8, lanes=lanes)

    def outcomes(devices: list[str]) -> list[tuple[object, ...]]:
        engine = Engine(load_model("builtin:noise", devices=devices), limits, ar_tokens=1)
        return [outcome(completion) for completion in engine.generate(requests)]

    wanted = outcomes(["cuda:0"])
    assert outcomes(["cuda:0"] * 2) == wanted
    if torch.cuda.device_count() > 1:
        assert outcomes(["cuda:0", "cuda:1"]) == wanted
