"""One replica's work, free of Ray: reads units, keeps the engine full, publishes parts.

    add(unit) -> read + tokenise (thread) -> rows, longest first -> engine -> results -> part (thread) -> UnitDone

A unit's rows finish in any order. Up to two units are in at once (the dispatcher's rule), so the engine goes on with
the next one's rows while the last rows of the first finish; reading and publishing happen beside it, in two threads.

Rows that a failed forward took down are submitted again, once each. A second failure of one of them is raised: then it
is the engine, and the unit is for another replica.
"""

import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from model.errors import EngineError, RequestError, TwoTowerError
from model.params import Completion, GenerationParams, Request
from model.slots import PREFIX_SLOTS
from pipeline.dataset import UnitData
from pipeline.dispatch import UnitDone, UnitFailed, UnitProgress
from pipeline.types import Assignment, RowResult, UnitResult, WorkUnit
from workers.prefix import best_prefix, has_prefix

QUEUE_FACTOR = 2
"""Rows handed to the engine ahead of its slots, in multiples of its row limit: all slots can turn over in one step."""
TOKENISE_ROWS = 1000
"""Prompts tokenised in one call: bounds the Python lists that exist beside the compact ones."""

T = TypeVar("T")
Outcome = UnitDone | UnitFailed


class EngineLike(Protocol):
    """What the runner needs of model.Engine."""

    @property
    def waiting(self) -> int:
        """Requests that are not in a slot yet."""

    @property
    def max_rows(self) -> int:
        """Rows generated together at most. It falls where memory runs out."""

    def submit(self, request: Request) -> None:
        """Raises RequestError where the request can never run."""

    def step(self) -> Sequence[Completion]:
        """One turn of the engine; the rows that finished in it. Raises EngineError with the rows that it lost."""


class TokenizerLike(Protocol):
    """What the runner needs of a checkpoint's tokenizer."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...


class UnitStore(Protocol):
    """Where units are read and parts go. Called from threads. Both raise TwoTowerError where this unit cannot."""

    def read(self, unit: WorkUnit) -> UnitData: ...

    def publish(self, data: UnitData, results: Sequence[RowResult], *, attempt: int, seconds: float) -> UnitResult: ...


@dataclass(frozen=True, slots=True)
class _Row:
    """A row to generate."""

    index: int
    """In the unit."""
    ids: "array[int]"
    """Its prompt; compact: 4 bytes a token."""
    prefix_tokens: int
    failures: int = 0
    """Forwards that failed with it."""


@dataclass(slots=True)
class _OpenUnit:
    """A unit on its way: rows still to be submitted, rows finished."""

    data: UnitData
    attempt: int
    started: float
    queue: deque[_Row] = field(default_factory=deque)
    """Rows to submit, those with the most tokens to compute first: rows of like lengths are prefilled together."""
    results: list[RowResult] = field(default_factory=list)
    errors: int = 0
    tokens: int = 0


class UnitRunner:
    """Drives one engine over units. `work` is for one thread; `add` may be called from another one."""

    def __init__(
        self,
        engine: EngineLike,
        tokenizer: TokenizerLike,
        store: UnitStore,
        params: GenerationParams,
        *,
        replica: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._tokenizer, self._store, self._params = engine, tokenizer, store, params
        self._replica, self._clock = replica, clock
        self._max_rows = engine.max_rows  # as last told to the operator
        # fixed: where the engine lowers its row limit because memory runs out, rows wait there instead of here
        self._queue_limit = QUEUE_FACTOR * engine.max_rows
        # A thread each, not two for both: a reader reads one unit at a time, and no part waits behind a reading.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read")
        self._publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._wake = threading.Event()  # set by whatever gives an idle runner something to do
        self._units: dict[str, Assignment] = {}  # by id, from add to outcome
        self._added: deque[Assignment] = deque()
        self._reading: dict[str, Future[_OpenUnit]] = {}
        self._open: dict[str, _OpenUnit] = {}  # in the order they came
        self._publishing: dict[str, Future[UnitResult]] = {}
        self._in_engine: dict[str, tuple[_OpenUnit, _Row]] = {}  # by row key
        self._prefixes: deque[array[int]] = deque(maxlen=PREFIX_SLOTS)  # the reader's: those named last, newest last

    @property
    def busy(self) -> bool:
        """Whether any unit is in."""
        return bool(self._units)

    def add(self, work: Assignment) -> None:
        """Take a unit. Raises ValueError for one that is in already: its row keys would be twice in the engine."""
        unit = work.unit
        if unit.id in self._units:
            raise ValueError(f"unit {unit.id} is already on replica {self._replica}")
        self._units[unit.id] = work
        self._added.append(work)
        self._wake.set()

    def work(self, seconds: float) -> list[Outcome]:
        """Run until a unit is finished or `seconds` have passed; returns what became of the finished ones.

        Raises what the engine raises (EngineError where a row failed twice), and errors of reading or publishing that
        are not the project's own: the runner is then not to be used again.
        """
        deadline = self._clock() + seconds
        while True:
            self._wake.clear()
            self._start_reading()
            outcomes = [*self._collect_read(), *self._collect_published()]
            left = deadline - self._clock()
            if outcomes or left <= 0:
                return outcomes
            self._top_up()
            if self._in_engine:
                self._step()
            else:
                self._wake.wait(left)

    def progress(self) -> list[UnitProgress]:
        """How far each unit is that has begun to give rows."""
        return [
            UnitProgress(self._replica, self._units[unit_id].key, len(unit.results), unit.errors, unit.tokens)
            for unit_id, unit in self._open.items()
        ]

    def close(self) -> None:
        """Let go of the threads; units under way are abandoned."""
        for threads in (self._reader, self._publisher):
            threads.shutdown(wait=False, cancel_futures=True)

    def _start_reading(self) -> None:
        while self._added:
            work = self._added.popleft()
            self._reading[work.unit.id] = self._spawn(self._reader, self._read, work.unit, work.attempt)

    def _spawn(self, threads: ThreadPoolExecutor, task: Callable[..., T], *args: object) -> Future[T]:
        future = threads.submit(task, *args)
        future.add_done_callback(lambda _future: self._wake.set())
        return future

    def _read(self, unit: WorkUnit, attempt: int) -> _OpenUnit:
        """In a thread: read, tokenise, settle the rows that cannot be generated, sort the others."""
        opened = _OpenUnit(self._store.read(unit), attempt, self._clock())
        good = []
        for row in opened.data.rows:
            if row.prompt is None:
                self._add_error(opened, row.index, row.error or "the row has no prompt")
            else:
                good.append((row.index, row.prompt))
        tokenised: list[tuple[int, array[int]]] = []
        for start in range(0, len(good), TOKENISE_ROWS):
            chunk = good[start : start + TOKENISE_ROWS]
            encoded = self._tokenizer.encode_batch([prompt for _, prompt in chunk])
            for (index, _), ids in zip(chunk, encoded, strict=True):
                if ids:
                    tokenised.append((index, array("i", ids)))
                else:
                    self._add_error(opened, index, "the prompt has no tokens")
        prefix = self._find_prefix([ids for _, ids in tokenised])
        rows = [_Row(index, ids, len(prefix) if has_prefix(ids, prefix) else 0) for index, ids in tokenised]
        opened.queue.extend(sorted(rows, key=lambda row: (row.prefix_tokens - len(row.ids), row.index)))
        return opened

    def _find_prefix(self, prompts: "Sequence[array[int]]") -> "array[int]":
        """In the reader's thread: the prefix that the unit's rows name."""
        prefix = best_prefix(prompts, self._prefixes)
        if prefix:
            if prefix in self._prefixes:
                self._prefixes.remove(prefix)
            self._prefixes.append(prefix)
        return prefix

    def _collect_read(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for unit_id in [unit_id for unit_id, future in self._reading.items() if future.done()]:
            try:
                opened = self._reading.pop(unit_id).result()
            except TwoTowerError as error:
                outcomes.append(self._fail(unit_id, error))
                continue
            self._open[unit_id] = opened
            self._publish_if_complete(opened)
        return outcomes

    def _top_up(self) -> None:
        for opened in list(self._open.values()):
            while opened.queue and self._engine.waiting < self._queue_limit:
                row = opened.queue.popleft()
                key = opened.data.rows[row.index].key
                try:
                    self._engine.submit(Request(key, row.ids, self._params, row.prefix_tokens))
                except RequestError as error:
                    self._add_error(opened, row.index, str(error), prompt_tokens=len(row.ids))
                    self._publish_if_complete(opened)
                else:
                    self._in_engine[key] = opened, row

    def _step(self) -> None:
        try:
            completions = self._engine.step()
        except EngineError as error:
            completions = error.completions
            self._put_back(error)
        if (rows := self._engine.max_rows) < self._max_rows:
            self._say(f"memory ran out: engine.max_rows is {rows} from now on, not {self._max_rows}; set it so")
            self._max_rows = rows
        for completion in completions:
            opened, row = self._in_engine.pop(completion.key)
            self._add(opened, row.index, completion)
            self._publish_if_complete(opened)

    def _put_back(self, error: EngineError) -> None:
        """Queues the rows that a failed step lost once more. Raises the error where it names none, or one again."""
        lost = [self._in_engine.pop(key) for key in error.keys]
        if not lost or any(row.failures for _, row in lost):
            raise error
        for opened, row in reversed(lost):
            opened.queue.appendleft(replace(row, failures=1))
        self._say(f"{error}; trying its {len(lost)} rows once more")

    def _say(self, text: str) -> None:
        print(f"{self._replica}: {text}", file=sys.stderr, flush=True)

    def _add_error(self, opened: _OpenUnit, index: int, error: str, prompt_tokens: int = 0) -> None:
        key = opened.data.rows[index].key
        self._add(opened, index, Completion(key=key, finish_reason="error", error=error, prompt_tokens=prompt_tokens))

    def _add(self, opened: _OpenUnit, index: int, completion: Completion) -> None:
        opened.results.append(RowResult(index, completion, self._params.mode, opened.attempt, self._replica))
        opened.errors += completion.finish_reason == "error"
        opened.tokens += len(completion.token_ids)

    def _publish_if_complete(self, opened: _OpenUnit) -> None:
        if len(opened.results) < len(opened.data.rows):
            return
        unit_id = opened.data.unit.id
        del self._open[unit_id]
        self._publishing[unit_id] = self._spawn(self._publisher, self._publish, opened)

    def _publish(self, opened: _OpenUnit) -> UnitResult:
        """In a thread."""
        seconds = self._clock() - opened.started
        return self._store.publish(opened.data, opened.results, attempt=opened.attempt, seconds=seconds)

    def _collect_published(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for unit_id in [unit_id for unit_id, future in self._publishing.items() if future.done()]:
            try:
                result = self._publishing.pop(unit_id).result()
            except TwoTowerError as error:
                outcomes.append(self._fail(unit_id, error))
            else:
                del self._units[unit_id]
                outcomes.append(UnitDone(result))
        return outcomes

    def _fail(self, unit_id: str, error: TwoTowerError) -> UnitFailed:
        return UnitFailed(self._replica, self._units.pop(unit_id), str(error))
