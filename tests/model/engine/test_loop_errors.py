"""Tests what the engine's loop does if something fails: which rows are named, which go on, and that nothing is left
behind."""

import itertools

import pytest

from model.engine.loop import Loop
from model.engine.sequence import Prefix
from model.requests import Completion, EngineError, Request
from tests.model.engine.cases import make_loop
from tests.model.engine.launches import Fault, NoMemoryError, ScriptedError, row_of
from tests.model.engine.runs import Case, Drawn, Run
from tests.model.engine.scripts import Script, expected, request

ABC = {"a": Script((2,)), "b": Script((3, 1)), "c": Script((1,))}
MODES = {"a": "diffusion", "b": "mock_ar", "c": "ar"}


def some() -> list[Request]:
    """Return one request of each mode."""
    return [request(key, 20, max_new_tokens=24, mode=mode) for key, mode in MODES.items()]


def resume(loop: Loop, again: dict[str, Request]) -> dict[str, Completion]:
    """Step to the end, with a check after each step; submit rows that errors name again, from `again`. Return the
    completions by key."""
    done: dict[str, Completion] = {}
    while loop.waiting or loop.active:
        try:
            ended = list(loop.step())
        except EngineError as error:
            if not isinstance(error.__cause__, ScriptedError | NoMemoryError):
                raise  # a rule of the backend was broken
            ended = list(error.completions)
            for key in error.keys:
                loop.submit(again[key])
        assert not done.keys() & {completion.key for completion in ended}
        done |= {completion.key: completion for completion in ended}
        loop.check()
        assert not loop.backend.ended_rows  # type: ignore[attr-defined]
    return done


def step_on(loop: Loop, done: dict[str, Completion]) -> None:
    """Step until something is raised."""
    for _ in range(1000):
        done |= {completion.key: completion for completion in loop.step()}


def generate_on(loop: Loop, requests: list[Request]) -> None:
    """Call generate() until something is raised."""
    for _ in range(100):
        loop.generate(requests)


def assert_as_told(done: dict[str, Completion], requests: list[Request], scripts: dict[str, Script]) -> None:
    """Check that each request has ended with the tokens of its script."""
    told = {each.key: expected(each.params, scripts[each.key]).token_ids for each in requests}
    assert {key: completion.token_ids for key, completion in done.items()} == told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["launch", "collect", "launch oom", "collect oom"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_every_single_forward_may_fail(kind: Fault, lanes: int) -> None:
    """Each forward of a run fails in turn, first alone and then with the two after it. By the checks of Run, all rows
    still end as scripted."""
    drawn = [
        Drawn(mode, 150, 30, 8, 4, Script((2, 4)), 1, 128, turn)
        for mode, turn in (("diffusion", 0), ("ar", 0), ("mock_ar", 2), ("diffusion", 3))
    ]
    for first, many in itertools.product(range(60), (1, 3)):
        faults = dict.fromkeys(range(first, first + many), kind)
        run = Run(Case(drawn, rows=3, lanes=lanes, budget_pages=1, faults=faults)).go()
        if "oom" in kind and many == 1:
            assert not run.named, "less at once would have done"


@pytest.mark.parametrize("error", [ScriptedError, NoMemoryError])
@pytest.mark.parametrize("name", ["begin", "enter"])
def test_a_backend_that_cannot_set_up_a_row(name: str, error: type[Exception]) -> None:
    """Whichever call of begin or enter fails, its rows are named or start again by themselves. No row is computed
    without the call."""
    for number in range(12):
        rows = some()
        loop, backend = make_loop(ABC, rows=2, failing_calls={name: {number}})
        backend.call_error = error
        for each in rows:
            loop.submit(each)
        assert_as_told(resume(loop, {each.key: each for each in rows}), rows, ABC)


def test_an_interrupted_generate_leaves_an_empty_engine() -> None:
    """Ctrl-C in any launch is raised, all slots are free afterwards, and the next generate() returns everything."""
    for number in range(40):
        rows = some()
        loop, backend = make_loop(ABC, rows=2, lanes=2, faults={number: "launch interrupt"})
        with pytest.raises(KeyboardInterrupt):
            generate_on(loop, rows)
        loop.check()
        assert (loop.waiting, loop.active, backend.slots.free_slots) == (0, 0, backend.slots.slots)
        again = {completion.key: completion for completion in loop.generate(rows)}
        assert_as_told(again, rows, ABC)
        assert loop.step() == []


def test_an_interrupt_takes_the_rows_of_its_forward_alone() -> None:
    """Ctrl-C in a step removes only the rows of the interrupted forward, and their keys are free. Rows of other
    forwards go on."""
    for number in range(12):
        rows = some()
        loop, _ = make_loop(ABC, lanes=2, faults={number: "launch interrupt"})
        for each in rows:
            loop.submit(each)
        done: dict[str, Completion] = {}
        with pytest.raises(KeyboardInterrupt):
            step_on(loop, done)
        loop.check()
        inside = set(loop.scheduler.running) | {row.request.key for row in loop.scheduler.waiting}
        inside |= {completion.key for completion in loop._finished}
        for each in rows:
            if each.key not in inside | set(done):
                loop.submit(each)
        assert_as_told(done | resume(loop, {}), rows, ABC)


def test_a_failure_does_not_reach_the_next_generate() -> None:
    """If the extend of a block and its denoiser forward fail together, one error is raised, and the next call is not
    affected."""
    row = request("a", 20, max_new_tokens=24)
    probe, backend = make_loop(ABC)
    probe.generate([row])
    first = next(i for i, launch in enumerate(backend.launches) if launch.kind == "context" and launch.blocks)
    loop, _ = make_loop(ABC, faults={first: "collect", first + 1: "collect"})
    with pytest.raises(EngineError) as raised:
        loop.generate([row])
    assert raised.value.keys == ("a",)
    assert isinstance(raised.value.__cause__, ScriptedError)
    assert_as_told({"a": loop.generate([row])[0]}, [row], ABC)


def test_a_forward_of_cancelled_rows_may_fail_in_silence() -> None:
    """If a forward of cancelled rows fails, no row is lost and no error is raised. The next row runs and ends."""
    loop, _ = make_loop(ABC, faults={1: "collect"})
    loop.submit(request("a", 20, max_new_tokens=24))
    loop.step()
    assert loop.cancel("a")
    row = request("b", 20, max_new_tokens=24)
    loop.submit(row)
    assert_as_told(resume(loop, {}), [row], ABC)


def test_limits_are_halved_once_for_what_was_under_way_together() -> None:
    """If four forwards that two lanes launched in one turn run out of memory, the limits are halved once, not four
    times, and all rows end."""
    scripts = {f"r{i}": Script((1 + i % 3,)) for i in range(32)}
    rows = [request(key, 20, max_new_tokens=40) for key in scripts]
    probe, backend = make_loop(scripts, rows=16, budget=128, lanes=2)
    for each in rows:
        probe.submit(each)
    launched: list[int] = []
    while not (len(launched) == 4 and all(backend.launches[i].pieces for i in launched[::2])):
        before = len(backend.launches)
        probe.step()
        assert probe.active
        launched = list(range(before, len(backend.launches)))
    loop, _ = make_loop(scripts, rows=16, budget=128, lanes=2, faults=dict.fromkeys(launched, "collect oom"))
    for each in rows:
        loop.submit(each)
    assert_as_told(resume(loop, {}), rows, scripts)
    assert loop.max_rows == 8
    assert loop.scheduler.prefill_budget == 64
    loop.set_max_rows(16)
    assert loop.max_rows == 16


def test_limits_grow_again_when_memory_has_been_enough_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """If 16 rows run out of memory twice, 4 rows run. The limit is then doubled every CALM_STEPS steps, to 8 and to 16,
    and not beyond."""
    monkeypatch.setattr("model.engine.loop.CALM_STEPS", 10)
    scripts = {f"r{i}": Script((3,)) for i in range(80)}
    rows = [request(key, 20, max_new_tokens=40) for key in scripts]
    loop, _ = make_loop(scripts, rows=16, budget=256, faults={1: "collect oom", 3: "launch oom"})
    for each in rows:
        loop.submit(each)
    seen: list[tuple[int, int]] = []
    done: list[Completion] = []
    while loop.waiting or loop.active:
        done += loop.step()
        loop.check()
        if not seen or seen[-1] != (loop.max_rows, loop.scheduler.prefill_budget):
            seen.append((loop.max_rows, loop.scheduler.prefill_budget))
    assert seen == [(16, 256), (4, 64), (8, 128), (16, 256)]
    assert {completion.key for completion in done} == set(scripts)


def test_memory_that_is_never_enough_is_an_error() -> None:
    """If memory does not even suffice for one row and a page of its prompt, an error names the row, and the loop does
    not try forever."""
    loop, _ = make_loop(ABC, rows=8, budget=512, faults=dict.fromkeys(range(40), "launch oom"))
    loop.submit(request("a", 500, max_new_tokens=8))
    with pytest.raises(EngineError, match="NoMemoryError") as raised:
        step_on(loop, {})
    loop.check()
    assert (raised.value.keys, loop.waiting, loop.active) == (("a",), 0, 0)


def test_a_failed_prefix_takes_all_that_began_with_it() -> None:
    """If the last piece of a prefix fails, all rows that began after it are named. Submitted again, they run with a new
    prefix."""
    shared = list(range(50_000, 50_128))
    scripts = dict.fromkeys("abcd", Script((2,)))
    rows = [request(key, 140, shared=shared, prefix_tokens=128 * (key != "d"), max_new_tokens=16) for key in scripts]
    loop, backend = make_loop(scripts, rows=3, budget=64, faults={1: "collect"})
    for each in rows:
        loop.submit(each)
    named: list[str] = []
    while not named:
        try:
            assert loop.step() == []
        except EngineError as error:
            named = list(error.keys)
        loop.check()
    assert named == ["a", "b", "c"]
    assert not loop.scheduler.prefixes
    for each in rows[:3]:
        loop.submit(each)
    assert_as_told(resume(loop, {}), rows, scripts)
    pieces = [item for launch in backend.launches for item, _ in launch.pieces]
    assert len([item for item in pieces if isinstance(item, Prefix)]) == 4


@pytest.mark.parametrize("kind", ["launch", "collect", "launch oom", "collect oom"])
def test_a_shared_context_forward_fails_for_prompts_and_blocks(kind: Fault) -> None:
    """If a forward with two prompts, finished blocks and an AR row fails, all its rows are named or, if memory ran out,
    all start again. Other rows go on."""
    scripts = {"a": Script((1,)), "b": Script((8,)), "c": Script((1,)), "d": Script((1,)), "e": Script((2,))}
    rows = [request(key, 20, max_new_tokens=24, mode="ar" if key == "c" else "diffusion") for key in scripts]
    loop, backend = make_loop(scripts, rows=5)
    for each in rows[:3]:
        loop.submit(each)
    loop.step()
    loop.step()
    backend.faults[len(backend.launches)] = kind
    for each in rows[3:]:
        loop.submit(each)
    named: tuple[str, ...] = ()
    try:
        loop.step()
        loop.step()
    except EngineError as error:
        named = error.keys
    failed = next(launch for i, launch in enumerate(backend.launches) if i in backend.faults)
    assert [row_of(item).request.key for item, _ in failed.work] == ["d", "e", "a", "c"]
    assert named == (() if "oom" in kind else ("d", "e", "a", "c"))
    for key in named:
        loop.submit(next(each for each in rows if each.key == key))
    assert_as_told(resume(loop, {}), rows, scripts)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [2, 3])
def test_a_prompt_that_failed_in_another_lane_is_never_looked_at(lanes: int) -> None:
    """If the forward that reads a prompt fails in one lane, the lane that fills the row's blocks never uses the row,
    even if another forward fails in between. The scripted backend would notice."""
    drawn = [Drawn("diffusion", 30 + 20 * i, 4, 4, 1, Script((1,)), 0, 0, i % 5) for i in range(9)]
    for first in range(30):
        for other in range(first + 1, first + 8):
            Run(Case(drawn, rows=6, lanes=lanes, budget_pages=2, faults={first: "collect", other: "collect"})).go()


def test_rows_that_end_while_slots_are_added_are_given_out() -> None:
    """A row that ends while set_max_rows collects the forwards in progress is still returned by a later step."""
    loop, _ = make_loop({"a": Script((1,))}, rows=1)
    loop.submit(request("a", 20, max_new_tokens=8))
    loop.step()
    loop.set_max_rows(5)
    assert loop.active == 1
    assert [completion.key for completion in resume(loop, {}).values()] == ["a"]


def test_more_rows_may_fail_and_change_nothing() -> None:
    """If a forward in progress fails, or there is no memory for more slots, set_max_rows leaves the limit as it was,
    and the rows go on."""
    rows = some()
    loop, backend = make_loop(ABC, rows=3, faults={1: "collect"}, failing_calls={"add_slots": {0}})
    for each in rows:
        loop.submit(each)
    loop.step()
    with pytest.raises(EngineError) as raised:
        loop.set_max_rows(6)
    assert loop.max_rows == 3
    with pytest.raises(ScriptedError):
        loop.set_max_rows(6)
    assert (loop.max_rows, backend.slots.slots) == (3, 5)
    for each in rows:
        if each.key in raised.value.keys:
            loop.submit(each)
    loop.set_max_rows(6)
    assert backend.slots.slots == 8
    assert_as_told(resume(loop, {}), rows, ABC)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_tokenizer_that_fails_on_one_row(error: type[BaseException]) -> None:
    """If the tokenizer fails on one row, this row is named, and all other rows of the forward are returned. After
    Ctrl-C, the rows handled before it are returned."""
    scripts = dict.fromkeys("abc", Script((1,)))
    loop, backend = make_loop(scripts)
    calls = itertools.count()

    def decode(ids: object) -> str:
        if next(calls) == 1:
            raise error("no letter")
        return str(ids)

    loop._decode = decode
    rows = [request(key, 20, max_new_tokens=8) for key in "abc"]
    for each in rows:
        loop.submit(each)
    loop.step()
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            loop.step()
        assert [completion.key for completion in loop.step()] == ["a"]
    else:
        with pytest.raises(EngineError) as raised:
            loop.step()
        assert raised.value.keys == ("b",)
        assert [completion.key for completion in raised.value.completions] == ["a", "c"]
    loop.check()
    assert backend.slots.free_slots == backend.slots.slots
