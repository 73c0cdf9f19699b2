"""Tests the engine's loop over a scripted backend: whatever comes, in any order, every request ends once and as
scripted."""

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings

from model.engine.backend import Batch
from model.engine.loop import Loop
from model.engine.sequence import ActiveRow, Prefix
from model.errors import RequestError
from model.requests import Completion, Request
from model.runtime.page_allocator import PAGE_SIZE
from tests.model.engine.cases import ScriptedBackend, make_loop
from tests.model.engine.launches import Fault, Ticket, row_of
from tests.model.engine.runs import Case, Drawn, Run, cases
from tests.model.engine.scripts import Script, request


@pytest.mark.slow
@settings(max_examples=150)
@given(cases(calm=True))
def test_every_request_ends_once_and_as_scripted(case: Case) -> None:
    """Requests of any modes, lengths, prefixes and arrivals pass through few slots and pages. The checks of Run hold,
    and the counts of tokens add up."""
    run = Run(case).go()
    assert not run.cancelled
    assert not run.named
    stats, launched = run.loop.stats, [launch.pieces for launch in run.backend.launches if launch.pieces]
    assert stats.prefill_tokens == sum(count for work in launched for _, count in work)
    assert stats.padded_tokens == sum(len(work) * max(count for _, count in work) for work in launched)
    assert sum(completion.preemptions for completion in run.done.values()) == stats.preemptions
    of_prefixes = sum(count for work in launched for item, count in work if isinstance(item, Prefix))
    prompts = sum(len(request.prompt_ids) - (request.params.mode != "diffusion") for request in run.requests.values())
    if not stats.preemptions:
        assert stats.prefill_tokens - of_prefixes + stats.shared_tokens == prompts


@pytest.mark.slow
@settings(max_examples=150)
@given(cases(calm=True, growing=True))
def test_rows_that_go_back_for_want_of_pages_end_as_scripted(case: Case) -> None:
    """With pages for little more than one row, preempted rows start again and end as scripted. The oldest row is never
    preempted."""
    run = Run(case).go()
    assert run.done[run.first].preemptions == 0


@pytest.mark.slow
@settings(max_examples=250)
@given(cases(calm=False) | cases(calm=False, growing=True))
def test_nothing_is_lost_in_cancels_limits_and_failures(case: Case) -> None:
    """Requests are cancelled, row limits change, and forwards fail or run out of memory at any time. Rows that errors
    name are submitted again and end as scripted."""
    Run(case).go()


def test_rows_that_are_being_extended_are_kept_if_an_older_forward_fails() -> None:
    """In an overlapping lane, the finished block of r2 is already being extended when the forward before it fails. r2
    is kept and ends."""
    drawn = Drawn("diffusion", 1, 1, 1, 1, Script((1,)), template=0, prefix_tokens=0, turn=0)
    slow = dataclasses.replace(drawn, block=10, steps_limit=8, script=Script((8,)))
    two = dataclasses.replace(drawn, limit=2, steps_limit=2, script=Script((2,)))
    long = dataclasses.replace(drawn, prompt=109, limit=20)
    requests = [drawn, slow, two, drawn, long, drawn]
    faults: dict[int, Fault] = {0: "launch", 4: "collect"}
    case = Case(requests, rows=2, spare_pages=0, budget_pages=1, overlap_rows=1, faults=faults)
    assert "r2" in Run(case).go().done


def drive(loop: Loop, requests: list[Request]) -> dict[str, Completion]:
    """Submit the requests, then step and check until nothing is left; return the completions by key."""
    for each in requests:
        loop.submit(each)
    done: dict[str, Completion] = {}
    while loop.waiting or loop.active:
        done |= {completion.key: completion for completion in loop.step()}
        loop.check()
    return done


def test_a_long_prompt_lets_the_others_go_on() -> None:
    """While a prompt of 100,000 tokens is read in pieces, every turn denoises the other rows, and a short prompt waits
    for two turns at most."""
    keys = [f"s{i}" for i in range(40)]
    loop, backend = make_loop(dict.fromkeys([*keys, "long"], Script((2,))), rows=8, pages=4000, budget=1024)
    for each in [request("long", 100_000, max_new_tokens=8), request("s0", 50, max_new_tokens=10_000)]:
        loop.submit(each)
    long_turns, came = 0, {}
    loop.step()
    loop.step()
    for turn in range(190):
        if not turn % 5 and turn // 5 + 1 < len(keys):
            key = keys[turn // 5 + 1]
            came[key] = turn
            loop.submit(request(key, 30 + turn, max_new_tokens=16))
        before = len(backend.launches)
        loop.step()
        launched = backend.launches[before:]
        fed = {row_of(item).request.key for launch in launched for item, _ in launch.pieces}
        long_turns += "long" in fed
        assert any(launch.kind == "denoise" for launch in launched)
        for key in fed - {"long"}:
            assert turn - came.pop(key) <= 2
    assert long_turns * 1024 >= 97_000, "the long prompt has been put off"
    assert not {key for key, turn in came.items() if turn < 185}


def test_a_prefix_is_computed_once_and_kept() -> None:
    """The tokens of a prefix that many rows share, some of them much later, are computed once, and no row computes them
    again."""
    shared = list(range(900_000, 900_200))
    keys = [f"r{i}" for i in range(12)]
    loop, backend = make_loop(dict.fromkeys(keys, Script()), rows=3, budget=64)
    for half in (keys[:6], keys[6:]):
        rows = [request(key, 230, shared=shared, prefix_tokens=200, max_new_tokens=4) for key in half]
        assert set(drive(loop, rows)) == set(half)
    work = [piece for launch in backend.launches for piece in launch.pieces]
    assert sum(count for item, count in work if isinstance(item, Prefix)) == 192
    assert sum(count for item, count in work if isinstance(item, ActiveRow)) == 12 * (230 - 192)
    assert loop.stats.shared_tokens == 12 * 192
    assert [len(prefix) for prefix in loop.scheduler.prefixes] == [192]


def test_unused_prefixes_give_way() -> None:
    """A third prefix takes the slot of the one whose last use is longest ago. A row that needs pages takes those of all
    unused prefixes."""
    shared = [[start + i for i in range(128)] for start in (10_000, 20_000, 30_000)]
    loop, _ = make_loop(dict.fromkeys("abcde", Script()), rows=2, pages=12)
    for key, tokens in zip("abcd", (shared[0], shared[1], shared[0], shared[2]), strict=True):
        drive(loop, [request(key, 140, shared=tokens, prefix_tokens=128, max_new_tokens=2)])
    assert list(loop.scheduler.prefixes) == [tuple(shared[0]), tuple(shared[2])]
    drive(loop, [request("e", 11 * PAGE_SIZE, max_new_tokens=4)])
    assert not loop.scheduler.prefixes


def test_a_row_that_is_all_prefix_needs_no_prefill_of_its_own() -> None:
    """A row whose whole prompt is a prefix needs no prefill of its own, in any mode, and beside a row whose prompt goes
    on after the same prefix."""
    shared = list(range(700_000, 700_129))
    modes = {"d": ("diffusion", 128), "a": ("ar", 129), "m": ("mock_ar", 129), "more": ("diffusion", 129)}
    loop, backend = make_loop(dict.fromkeys(modes, Script((2, 1))))
    done = drive(
        loop,
        [
            request(key, length, shared=shared, prefix_tokens=length, mode=mode, max_new_tokens=20)
            for key, (mode, length) in modes.items()
        ],
    )
    assert {len(completion.token_ids) for completion in done.values()} == {20}
    assert [count for launch in backend.launches for _, count in launch.pieces] == [128, 1]


def test_finished_blocks_wait_for_each_other_no_longer_than_told() -> None:
    """With extend_every=3, context forwards run every third turn and take the blocks of three turns. The number of
    tokens is the same."""
    keys = {f"r{i}": Script((1 + i % 4, 3)) for i in range(12)}
    rows = [request(key, 20, max_new_tokens=64) for key in keys]
    seen = {}
    for every in (1, 3):
        loop, backend = make_loop(keys, rows=12, extend_every=every)
        done = drive(loop, rows)
        seen[every] = len([launch for launch in backend.launches if launch.kind == "context" and launch.blocks])
        assert {len(done[key].token_ids) for key in keys} == {64}
    # with one row, waiting gains nothing: the lane would have no work
    assert seen[3] < 0.6 * seen[1]
    single, backend = make_loop({"r1": keys["r1"]}, extend_every=3)
    drive(single, [rows[1]])
    assert [launch.kind for launch in backend.launches][:6] == 2 * ["context", "denoise", "denoise"]


def test_statistics_of_a_scripted_run() -> None:
    """The statistics of two rows are those worked out by hand: forwards, rows in these forwards, and seconds (a
    scripted forward takes one)."""
    loop, _ = make_loop({"a": Script((2,)), "b": Script((4, 1))})
    rows = [request("a", 10, max_new_tokens=16), request("b", 10, max_new_tokens=16)]
    done = drive(loop, rows)
    # a: D D . E D D end      rows of these forwards: 2 2 | 1 | 2 2
    # b: D D D D E D end      2 2 2 2 | 1 | 1
    a, b = done["a"], done["b"]
    assert (a.steps_per_block, b.steps_per_block) == ((2, 2), (4, 1))
    assert a.batch_rows == pytest.approx((2 + 2 + 1 + 2 + 2) / 5)
    assert b.batch_rows == pytest.approx((2 + 2 + 2 + 2 + 1 + 1) / 6)
    assert [(c.prefill_s, c.denoise_s, c.commit_s) for c in (a, b)] == [(1, 4, 1), (1, 5, 1)]
    assert all(c.latency_s > c.queue_s > 0 for c in (a, b))


def test_a_shared_context_forward_counts_whole_for_prompts_and_blocks() -> None:
    """If one forward reads a prompt and takes in a finished block, its second counts in full as prefill_s of one row
    and as commit_s of the other."""
    loop, backend = make_loop({"a": Script((1,)), "b": Script((1,))}, rows=2)
    loop.submit(request("a", 10, max_new_tokens=24))
    loop.step()
    done = drive(loop, [request("b", 10, max_new_tokens=8)])
    assert [(len(launch.pieces), len(launch.blocks)) for launch in backend.launches[2:4]] == [(1, 1), (0, 2)]
    assert [(done[key].prefill_s, done[key].commit_s) for key in "ab"] == [(1, 2), (1, 0)]
    # a: denoised alone, extended with b's prompt, denoised with b, extended and denoised alone
    assert done["a"].batch_rows == pytest.approx((1 + 2 + 2 + 1 + 1) / 5)
    assert done["b"].batch_rows == 2


def test_prompts_wait_for_finished_blocks_no_longer_than_told() -> None:
    """A prompt is read when the lane has filled its blocks, or earlier if extend_every says so; extend_every may be far
    above the steps of a block."""
    scripts = {**{f"r{i}": Script((7,)) for i in range(8)}, "late": Script((1,))}
    for every, most in ((1, 0), (3, 2), (1000, 7)):
        loop, backend = make_loop(scripts, rows=9, extend_every=every)
        for key in scripts.keys() - {"late"}:
            loop.submit(request(key, 20, max_new_tokens=400))
        for _ in range(9):
            loop.step()
        loop.submit(request("late", 20, max_new_tokens=8))
        waited = 0
        while backend.entered[-1].request.key != "late" or backend.entered[-1].pending:
            loop.step()
            waited += 1
        assert waited - 1 <= most


def test_statistics_count_no_forward_before_a_row_or_between_its_blocks() -> None:
    """Forwards that run before a row comes, or while its full block waits to be extended, do not count in its
    statistics."""
    loop, _ = make_loop({"a": Script((8,)), "b": Script((2,))}, extend_every=4)
    loop.submit(request("a", 10, max_new_tokens=80))
    for _ in range(9):
        loop.step()
    done = drive(loop, [request("b", 10, max_new_tokens=24)])
    assert done["b"].steps_per_block == (2, 2, 2)
    assert (done["b"].denoise_s, done["b"].commit_s) == (6, 2)
    assert done["b"].batch_rows <= 2


def test_lanes_share_the_rows() -> None:
    """With nine rows in three lanes, most denoiser forwards have three rows, and none has more than four."""
    keys = [f"r{i}" for i in range(9)]
    loop, backend = make_loop(dict.fromkeys(keys, Script((3,))), rows=9, lanes=3)
    drive(loop, [request(key, 20, max_new_tokens=80) for key in keys])
    sizes = [len(launch.blocks) for launch in backend.launches if launch.kind == "denoise"]
    assert sizes.count(3) >= 0.8 * len(sizes)
    assert max(sizes) <= 4


def test_fewer_rows_from_now_on_and_more_again() -> None:
    """After set_max_rows lowers the limit, running rows go on and no row is admitted until enough have ended. A higher
    limit adds slots."""
    keys = [f"r{i}" for i in range(12)]
    loop, _ = make_loop(dict.fromkeys(keys, Script((2,))), rows=4)
    for key in keys:
        loop.submit(request(key, 20, max_new_tokens=24))
    loop.step()
    assert loop.active == 4
    loop.set_max_rows(1)
    loop.step()
    assert (loop.active, loop.waiting) == (4, 8)
    while loop.active > 1:
        loop.step()
    assert loop.waiting == 7
    loop.set_max_rows(7)
    loop.step()
    assert loop.active == 7
    with pytest.raises(RequestError, match="max_rows is 0"):
        loop.set_max_rows(0)


def test_a_cancelled_key_is_free_at_once() -> None:
    """A request that is cancelled in the queue, in prefill or while running can be submitted again, and then runs from
    the start."""
    loop, _ = make_loop({"x": Script((2,)), "y": Script()}, rows=1, budget=64)
    row = request("x", 400, max_new_tokens=32)
    for turns in (0, 1, 4, 9, 13):
        loop.submit(row)
        for _ in range(turns):
            assert not loop.step()
        assert loop.cancel("x")
        assert not loop.cancel("x")
        loop.check()
        assert (loop.active, loop.waiting) == (0, 0)
    other = dataclasses.replace(row, prompt_ids=row.prompt_ids[:70])
    assert drive(loop, [other])["x"].steps_per_block == (2, 2, 2, 2)


def test_generate_gives_completions_in_the_order_of_the_requests() -> None:
    """The longest prompts run first, and completions come back in the order of the requests. A busy engine refuses
    generate()."""
    keys = [f"r{i}" for i in range(7)]
    loop, backend = make_loop(dict.fromkeys(keys, Script((2,))), rows=2)
    rows = [request(key, 10 + 30 * (i * 4 % 7), max_new_tokens=8) for i, key in enumerate(keys)]
    assert [completion.key for completion in loop.generate(rows)] == keys
    lengths = [len(row.request.prompt_ids) for row in backend.entered]
    assert lengths == sorted(lengths, reverse=True)
    loop.submit(rows[0])
    with pytest.raises(RequestError, match="engine without rows"):
        loop.generate(rows[1:])


def test_rows_in_ar_mode_make_several_tokens_a_turn_where_nobody_waits() -> None:
    """AR rows make eight tokens a turn, or fewer if they may take no more, and one token a turn beside a row that fills
    blocks. The tokens are the same."""
    scripts = {"a": Script(), "b": Script(eos_at=10), "d": Script((2,))}
    rows = [request(key, 20, mode="ar", max_new_tokens=20) for key in "ab"]
    loop, backend = make_loop(scripts, ar_tokens=8)
    done = drive(loop, rows)
    assert (len(done["a"].token_ids), len(done["b"].token_ids)) == (20, 11)
    assert [len(launch.blocks) for launch in backend.launches if launch.blocks] == [2, 2, 1]
    loop, backend = make_loop(scripts, ar_tokens=8)
    beside = drive(loop, [rows[0], request("d", 20, max_new_tokens=200)])
    assert beside["a"].token_ids == done["a"].token_ids
    assert len([launch for launch in backend.launches if launch.blocks and launch.kind == "context"]) >= 20


def denoising_at_extensions(backend: ScriptedBackend) -> list[bool]:
    """Return a list that grows by one entry with each extend: whether a denoiser forward is in progress at that
    moment."""
    found: list[bool] = []
    extend = backend.extend

    def watched(batch: Batch, fill: Sequence[ActiveRow]) -> Ticket:
        found.append(any(ticket.kind == "denoise" and not ticket.collected for ticket in backend.tickets))
        return extend(batch, fill)

    backend.extend = watched  # type: ignore[method-assign]
    return found


def test_an_overlapping_lane_launches_the_extension_before_it_collects() -> None:
    """From overlap_rows rows on, most extends are launched while a denoiser forward of the lane is in progress. With
    fewer rows none is."""
    keys = {f"r{i}": Script((1 + i % 4, 3)) for i in range(6)}
    for rows, under_way in ((6, True), (2, False)):
        loop, backend = make_loop(keys, rows=rows, overlap_rows=3)
        found = denoising_at_extensions(backend)
        done = drive(loop, [request(key, 20, max_new_tokens=64) for key in keys])
        assert {len(completion.token_ids) for completion in done.values()} == {64}
        assert any(found) is under_way
        assert sum(found) > 0.5 * len(found) or not under_way
