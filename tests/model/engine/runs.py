"""Draws random runs of the engine's loop with hypothesis, and checks at each step what must hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from model.engine.scheduler import longest_context
from model.engine.sequence import ActiveRow, Prefix
from model.requests import Completion, EngineError, Request
from model.runtime.page_allocator import PAGE_SIZE, pages_for
from tests.model.engine.cases import make_loop
from tests.model.engine.launches import Fault, NoMemoryError, ScriptedError
from tests.model.engine.scripts import Script, expected, request, size_of

TEMPLATES = [[], *([kind * 100_000 + i for i in range(700)] for kind in (1, 2, 3))]
"""The beginnings of prompts. There are more of them than prefixes that an engine keeps."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One request of a run, and the turn in which it is submitted."""

    mode: str
    prompt: int
    limit: int
    block: int
    steps_limit: int
    script: Script
    template: int
    prefix_tokens: int
    turn: int

    def request(self, key: str) -> Request:
        """Return the request under this key."""
        return request(
            key,
            self.prompt,
            shared=TEMPLATES[self.template],
            prefix_tokens=min(self.prefix_tokens, self.prompt),
            mode=self.mode,
            max_new_tokens=self.limit,
            block_size=self.block,
            steps_per_block=self.steps_limit,
            confidence_threshold=0.5,
        )


@dataclass(frozen=True, slots=True)
class Case:
    """The settings of a run. A change is made before the step of its turn: ("rows", n) or ("cancel", number of the
    request)."""

    requests: Sequence[Drawn]
    rows: int = 3
    spare_pages: int = 40
    budget_pages: int = 8
    lanes: int = 1
    extend_every: int = 1
    ar_tokens: int = 1
    overlap_rows: int | None = None
    changes: Sequence[tuple[int, str, int]] = ()
    faults: dict[int, Fault] = field(default_factory=dict)
    failing_calls: dict[str, set[int]] = field(default_factory=dict)
    call_error: type[BaseException] = ScriptedError


scripts = st.builds(
    Script,
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=4).map(tuple),
    eos_at=st.none() | st.integers(0, 60),
    broken_block=st.none() | st.none() | st.none() | st.integers(0, 4),
)
prompts = st.integers(1, 200) | st.integers(1, 900) | st.integers(1, 5000)


def drawn_requests(*, growing: bool) -> st.SearchStrategy[Drawn]:
    """Return a strategy for requests. growing: prompts are short and completions long, so that rows take most of their
    pages while they generate."""
    return st.builds(
        Drawn,
        mode=st.sampled_from(["diffusion", "diffusion", "ar", "mock_ar"]),
        prompt=st.integers(1, 130) if growing else prompts,
        limit=st.integers(65, 400) if growing else st.integers(1, 20) | st.integers(1, 200),
        block=st.integers(16, 80) if growing else st.integers(1, 17) | st.integers(1, 80),
        steps_limit=st.integers(1, 8),
        script=scripts,
        template=st.integers(0, 3),
        prefix_tokens=st.sampled_from([0, 0, 64, 200, 640, 5000]),
        turn=st.just(0) | st.integers(0, 60),
    )


changes = st.tuples(st.integers(0, 80), st.just("rows"), st.integers(1, 9)) | st.tuples(
    st.integers(0, 80), st.just("cancel"), st.integers(0, 11)
)
fault_kinds: st.SearchStrategy[Fault] = st.sampled_from(
    ["launch", "collect", "launch oom", "collect oom", "launch interrupt", "collect interrupt"]
)


def cases(*, calm: bool, growing: bool = False) -> st.SearchStrategy[Case]:
    """Return a strategy for runs. calm: nothing is cancelled, no limit changes and nothing fails. growing: pages run
    out."""
    wild = {
        "changes": st.lists(changes, max_size=8),
        "faults": st.dictionaries(st.integers(0, 30) | st.integers(0, 120), fault_kinds, max_size=5),
        "failing_calls": st.dictionaries(
            st.sampled_from(["begin", "enter"]), st.sets(st.integers(0, 30), max_size=2), max_size=2
        ),
        "call_error": st.sampled_from([ScriptedError, NoMemoryError, KeyboardInterrupt]),
    }

    def build(lanes: int) -> st.SearchStrategy[Case]:
        return st.builds(
            Case,
            requests=st.lists(drawn_requests(growing=growing), min_size=2 if growing else 1, max_size=12),
            rows=st.integers(lanes, 6),
            spare_pages=st.integers(0, 3) if growing else st.integers(0, 8) | st.integers(0, 200),
            budget_pages=st.integers(1, 12),
            lanes=st.just(lanes),
            extend_every=st.integers(1, 4),
            ar_tokens=st.sampled_from([1, 1, 2, 8]),
            overlap_rows=st.sampled_from([None, None, 1, 2, 4]),
            **({} if calm else wild),
        )

    return st.integers(1, 3).flatmap(build)


class Run:
    """A run that takes a case to its end and makes all checks on the way."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.requests = {f"r{i}": drawn.request(f"r{i}") for i, drawn in enumerate(case.requests)}
        self.scripts = {f"r{i}": drawn.script for i, drawn in enumerate(case.requests)}
        most = max(pages_for(longest_context(each)) for each in self.requests.values())
        self.loop, self.backend = make_loop(
            self.scripts,
            rows=case.rows,
            pages=most + case.spare_pages,
            budget=case.budget_pages * PAGE_SIZE,
            lanes=case.lanes,
            extend_every=case.extend_every,
            ar_tokens=case.ar_tokens,
            overlap_rows=case.overlap_rows,
            faults=case.faults,
            failing_calls=case.failing_calls,
        )
        self.backend.call_error = case.call_error
        self.coming = sorted(self.requests, key=lambda key: case.requests[int(key[1:])].turn)
        self.first = self.coming[0]
        self.done: dict[str, Completion] = {}
        self.cancelled: set[str] = set()
        self.named: list[str] = []
        """Keys of rows that errors named; these rows were submitted again."""
        self.turns_unread = 0
        """Number of turns since a prompt was last read, while the same prompts are waiting."""

    def bound(self) -> int:
        """Return a number of steps that no run may exceed.

        The oldest request in the engine needs one step for each of its forwards. Each of its pieces and blocks may have
        to wait up to extend_every steps for the next context forward, and one more step if a lane overlaps. Younger
        requests that hold memory it needs must end or be preempted first, and in such a turn only one prompt may
        advance. So the oldest request ends within the number of all pieces plus twice the largest work of one request;
        then the next request is the oldest. A fault can make all of them start again once, with smaller pieces.
        """
        pieces, work = 0, 0
        for key, each in self.requests.items():
            told, params = expected(each.params, self.scripts[key]), each.params
            blocks = len(told.token_ids) // size_of(params) + 1
            work = max(
                work,
                blocks * (1 + self.case.extend_every + bool(self.case.overlap_rows))
                + max(told.forwards, len(told.token_ids)),
            )
            pieces += 2 * (pages_for(len(each.prompt_ids)) + 1)  # read once as a prefix, once as a row
        faults = len(self.case.faults) + sum(map(len, self.case.failing_calls.values()))
        return 90 + 2 * (len(self.requests) + faults + 1) * (self.case.extend_every * pieces + work)

    def go(self) -> "Run":
        """Run all requests to their ends and return the run."""
        turn, bound = 0, self.bound()
        while self.coming or self.loop.waiting or self.loop.active:
            self._arrive(turn)
            unread, launched = self._unread(), len(self.backend.launches)
            try:
                self._change(turn)
                ended: Sequence[Completion] = self.loop.step()
            except EngineError as error:
                ended = self._failed(error)
            except KeyboardInterrupt:
                ended = self._interrupted()
            for completion in ended:
                self._end(completion)
            self._check()
            stands = unread and unread == self._unread()
            stands = stands and not any(launch.pieces for launch in self.backend.launches[launched:])
            self.turns_unread = self.turns_unread + 1 if stands else 0
            if not (self.case.faults or self.case.failing_calls):
                assert self.turns_unread < self.case.extend_every, "prompts are not read"
            turn += 1
            assert turn < bound, "no end"
        self._check_end()
        return self

    def _arrive(self, turn: int) -> None:
        while self.coming and self.case.requests[int(self.coming[0][1:])].turn <= turn:
            self.loop.submit(self.requests[self.coming.pop(0)])

    def _change(self, turn: int) -> None:
        for at, what, number in self.case.changes:
            if at != turn:
                continue
            if what == "rows":
                self.loop.set_max_rows(number)
            elif self.loop.cancel(f"r{number}"):
                assert f"r{number}" not in self.done | dict.fromkeys(self.cancelled)
                self.cancelled.add(f"r{number}")

    def _failed(self, error: EngineError) -> Sequence[Completion]:
        if error.__cause__ and not isinstance(error.__cause__, ScriptedError | NoMemoryError):
            raise error.__cause__  # a rule of the backend was broken
        assert len(set(error.keys)) == len(error.keys)
        assert error.keys, "an error that concerns nobody"
        for key in error.keys:
            assert key not in self.done
            assert key not in self.cancelled
            self.loop.submit(self.requests[key])  # raises if the request is still in the engine
            self.named.append(key)
        return error.completions

    def _interrupted(self) -> Sequence[Completion]:
        """Submit lost requests again. An interrupt does not name them: they have not ended and are no longer in the
        engine."""
        inside = set(self.loop.scheduler.running) | {row.request.key for row in self.loop.scheduler.waiting}
        inside |= {completion.key for completion in self.loop._finished}
        inside |= self.done.keys() | self.cancelled | set(self.coming)
        for key in self.requests.keys() - inside:
            self.loop.submit(self.requests[key])
            self.named.append(key)
        return ()

    def _unread(self) -> list[tuple[ActiveRow | Prefix, int]]:
        """Return the prompts in prefill, each with the number of tokens that are left."""
        return [(item, len(item.pending)) for item in self.loop.scheduler.prefilling]

    def _end(self, completion: Completion) -> None:
        key = completion.key
        assert key not in self.done, "ended twice"
        assert key not in self.cancelled
        self.done[key] = completion
        told, params = expected(self.requests[key].params, self.scripts[key]), self.requests[key].params
        seen = (
            completion.token_ids,
            completion.finish_reason,
            completion.steps_per_block,
            completion.denoiser_forwards,
        )
        assert seen == (told.token_ids, told.reason, told.steps, told.forwards)
        sure = [token % 7 / 8 for token in told.token_ids]
        assert completion.mean_confidence == (sum(sure) / len(sure) if sure else None)
        assert completion.forced_commits == (params.mode == "diffusion") * sum(c <= 0.5 for c in sure)

    def _check(self) -> None:
        self.loop.check()
        assert not self.backend.ended_rows, "a forward with rows that have ended"
        numbers = [row.number for row in self.loop.scheduler.waiting]
        assert numbers == sorted(set(numbers)), "the queue is out of order"
        calm = not (self.case.faults or self.case.failing_calls or self.case.overlap_rows)
        if self.case.lanes == 1 and calm:
            (lane,) = self.loop.scheduler.lanes
            waiting = [row for row in lane.extending if row.mode != "ar" or row.tokens]  # an AR row may have joined now
            assert lane.filling or not waiting, "rows wait for an extension in an idle lane"

    def _check_end(self) -> None:
        assert set(self.done) | self.cancelled == set(self.requests)
        scheduler, slots = self.loop.scheduler, self.loop.scheduler.allocator
        assert slots.free_slots == slots.slots - len(scheduler.prefixes)
        kept = sum(len(prefix.tokens) // PAGE_SIZE for prefix in scheduler.prefixes.values())
        assert slots.free_pages == slots.pages - kept
