"""`python -m tests.benchmarks.host`: measures what the host does in a turn of the loop.

Prints a table and writes tests/benchmarks/out/host.json. Everything is real except the device's work: the loop, the
scheduler, the tables of blocks and pages, and the inputs of a GPU's forwards (packed rows and attention plans). The
parts of a forward compute nothing, and predictions are drawn so that a fifth of the rows complete a block in each turn.
Times are those of this process on one thread, in milliseconds of processor time per turn:

    critical   from the arrival of a forward's predictions to the launch of the next forward
    turn       the whole turn, made up of:
    collect    what the device committed goes into the table of blocks
    loop       rows that ended or completed a block, admission, choice of the rows that come next
    begin      new blocks, and the settings of new rows
    extend, denoise    preparing a forward, up to its launch
    plans      packed rows and attention plans, within the parts of a forward
    device     torch on this CPU in place of launches: choosing tokens, committing (not included in `turn`)

Below each row the table shows the previous run. `--profile` shows the functions that take the most time instead.
"""

import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import load_model
from model.engine.backend import Batch, BlockReport
from model.engine.engine import AR_TOKENS, OVERLAP_ROWS
from model.engine.loop import Loop
from model.engine.model_runner import ModelRunner
from model.engine.scheduler import Scheduler
from model.engine.sequence import ActiveRow
from model.kernels.triton.attention_plan import Heads, Room, plan_attention
from model.network.context_cache import ContextCache
from model.network.two_tower import TwoTower
from model.requests import EngineLimits, GenerationParams, Mode, Request
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS
from model.runtime.ragged_batch import RaggedBatch
from model.runtime.stages import Flight, Part, Stages

OUT = Path(__file__).parent / "out" / "host.json"
HEADS = Heads(2, 16, PAGE_SIZE)  # as in the released model
PROMPT, COMPLETIONS = 896, (128, 384)  # tokens: 1,024 of context on average
LONGEST = PROMPT + COMPLETIONS[1] + 64
GRAPH_TOKENS = 32
"""Tokens of the longest row up to which a forward is planned in a room of fixed size, as for a CUDA graph."""
PREFILL_TOKENS, EXTEND_EVERY = EngineLimits().max_prefill_tokens, EngineLimits().extend_every
THRESHOLD = 0.5
"""The threshold for confidences drawn from [0, 1): it commits the last of 16 positions after 5 steps on average."""
TOKEN = 5
WARM_UP = 150  # turns after all prompts are prefilled
WINDOWS = 5  # the best of them counts, because other processes use the machine too
CASES: Sequence[tuple[Mode, int]] = (("diffusion", 16), ("diffusion", 128), ("diffusion", 384), ("ar", 16), ("ar", 128))
PARTS = ("collect", "loop", "begin", "extend", "denoise", "plans", "device")


@dataclass(frozen=True, slots=True)
class Turn:
    """The times of a turn on the host, in milliseconds."""

    critical: float
    total: float
    parts: dict[str, float]
    tokens: float
    """Tokens that all rows together get in a turn."""


class Clock:
    """Counts the processor time of each part, without that of the parts nested in it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.critical: list[float] = []
        self._inside: list[str] = []
        self._since = self._seen = 0.0  # `_seen`: when a turn's first predictions arrived; 0 after the next launch

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the processor time of the block for `name`."""
        self._charge()
        self._inside.append(name)
        try:
            yield
        finally:
            self._charge()
            self._inside.pop()

    def _charge(self) -> None:
        now = time.process_time()
        if self._inside:
            self.spent[self._inside[-1]] += now - self._since
        self._since = now

    def seen(self) -> None:
        """Keep the time of this call as the arrival of a turn's first predictions, unless one is kept already."""
        self._seen = self._seen or time.process_time()

    def launched(self) -> None:
        """Add the time since the arrival that `seen` kept to `critical`, and forget it; do nothing if none is kept."""
        if self._seen:
            self.critical.append(time.process_time() - self._seen)
            self._seen = 0.0


class NoTower:
    """A tower without layers that chooses the same token everywhere, with a random confidence."""

    def __init__(self, pair: TwoTower, *, causal: bool) -> None:
        self.causal, self.devices = causal, pair.context.devices
        self._generator = torch.Generator().manual_seed(0)

    def choose(self, hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """See Tower."""
        return torch.full((len(hidden),), TOKEN), torch.rand(len(hidden), generator=self._generator)


class NoModel:
    """A stand-in for the model that plans its forwards as for a GPU with graphs, and computes nothing."""

    def __init__(self, pair: TwoTower, clock: Clock) -> None:
        self.config, self.stages, self.devices = pair.config, pair.stages[:1], pair.devices
        self.context, self.denoiser = NoTower(pair, causal=True), NoTower(pair, causal=False)
        self._clock = clock
        self._static: dict[Room, Any] = {}

    def extend_parts(self, cache: ContextCache, rows: RaggedBatch) -> list[Part]:
        """See TwoTower."""
        del cache

        def part(x: Tensor) -> Tensor:
            with self._clock.part("plans"):
                self._plan(rows)
            self._clock.launched()
            return x

        return [part]

    def denoise_parts(self, cache: ContextCache, rows: RaggedBatch, t: Tensor) -> list[Part]:
        """See TwoTower."""
        del t
        return self.extend_parts(cache, rows)

    def _plan(self, rows: RaggedBatch) -> None:
        longest, count = max(rows.lengths), len(rows.lengths)
        if longest > GRAPH_TOKENS:
            rows.packed()
            plan_attention(rows, HEADS)
            return
        rows.packed(count, count * longest)
        room = Room.of(HEADS, count, longest, -(-LONGEST // PAGE_SIZE))
        plan = plan_attention(rows, HEADS, room)
        self._static.setdefault(room, plan).fill(plan)


class TimedStages:
    """The real stages, with the time in the parts of a forward counted as `device` and that of its end as `collect`."""

    def __init__(self, stages: Stages, clock: Clock) -> None:
        self._stages, self._clock = stages, clock

    def launch(self, parts: Sequence[Part], start: Any, finish: Callable[[Any], list[BlockReport]]) -> Flight:
        """See Stages."""

        def finished(predicted: Any) -> list[BlockReport]:
            self._clock.seen()
            with self._clock.part("collect"):
                return finish(predicted)

        with self._clock.part("device"):
            return self._stages.launch(parts, start, finished)


class TimedModelRunner(ModelRunner):
    """A model runner over no model, whose methods are timed."""

    def __init__(self, pair: TwoTower, cache: ContextCache, clock: Clock) -> None:
        stand_in: Any = NoModel(pair, clock)
        super().__init__(stand_in, cache)
        timed: Any = TimedStages(self.stages, clock)
        self.stages = timed
        self._clock = clock

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        with self._clock.part("begin"):
            super().enter(rows)

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        with self._clock.part("begin"):
            super().begin(rows, ar_tokens)

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Flight:
        with self._clock.part("extend"):
            return super().extend(batch, fill)

    def denoise(self, rows: Sequence[ActiveRow]) -> Flight:
        with self._clock.part("denoise"):
            return super().denoise(rows)


@torch.inference_mode()
def measure(pair: TwoTower, mode: Mode, rows: int, *, turns: int, profile: cProfile.Profile | None = None) -> Turn:
    """Measure a turn with `rows` running rows: the mean over the best of WINDOWS windows, judged by time per token."""
    clock = Clock()
    cache = pair.new_cache(slots=rows + PREFIX_SLOTS, kv_tokens=rows * LONGEST)
    loop = Loop(
        TimedModelRunner(pair, cache, clock),
        Scheduler(cache.allocator, rows, PREFILL_TOKENS),
        extend_every=EXTEND_EVERY,
        ar_tokens=AR_TOKENS,
        overlap_rows=OVERLAP_ROWS,
    )
    coming = _requests(mode)

    def run(turns: int) -> int:
        """Run the turns and return the tokens that all rows together got."""
        tokens = -_held(loop)
        for _ in range(turns):
            while loop.waiting < rows:
                loop.submit(next(coming))
            with clock.part("loop"):
                ended = loop.step()
            tokens += sum(len(completion.token_ids) for completion in ended)
        return tokens + _held(loop)

    best = None
    run(EXTEND_EVERY * rows * PROMPT // PREFILL_TOKENS + WARM_UP)
    window = max(1, turns // WINDOWS)
    for _ in range(WINDOWS):
        clock.spent.clear()
        clock.critical.clear()
        with profile or nullcontext():
            tokens = run(window)
        spent = {part: 1e3 * clock.spent[part] / window for part in PARTS}
        total = sum(spent.values()) - spent["device"]
        turn = Turn(1e3 * statistics.median(clock.critical), total, spent, tokens / window)
        if best is None or turn.total * best.tokens < best.total * turn.tokens:
            best = turn
    assert best is not None
    return best


def host_ms(pair: TwoTower, rows: int, *, turns: int) -> float:
    """Return the milliseconds of processor time of one turn with `rows` rows of diffusion in one lane."""
    return measure(pair, "diffusion", rows, turns=turns).total


def _held(loop: Loop) -> int:
    """Return the number of finished tokens of the running rows."""
    return sum(len(row.tokens) for row in loop.scheduler.running.values())


def _requests(mode: Mode) -> Iterator[Request]:
    draw = random.Random(0)
    for number in count():
        prompt = [draw.randrange(TOKEN, 64) for _ in range(PROMPT)]
        params = GenerationParams(mode=mode, max_new_tokens=draw.randint(*COMPLETIONS), confidence_threshold=THRESHOLD)
        yield Request(str(number), prompt, params)


def main() -> None:
    torch.set_num_threads(1)
    quick, profiled = "--quick" in sys.argv[1:], "--profile" in sys.argv[1:]
    console, pair = Console(width=None if sys.stdout.isatty() else 120), load_model("builtin:noise")
    before = json.loads(OUT.read_text()) if OUT.exists() else {}
    table = Table("mode, rows", "critical", "turn", *PARTS, "tokens", title="host, ms a turn", title_justify="left")
    found = {}
    for mode, rows in CASES:
        profile = cProfile.Profile() if profiled else None
        turn = measure(pair, mode, rows, turns=20 if quick else 200, profile=profile)
        if profile:
            console.rule(f"{mode}, {rows} rows")
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        name = f"{mode} {rows}"
        found[name] = asdict(turn)
        for label, one in ((name, found[name]), ("  before", before.get(name))):
            if one:
                figures = (one["critical"], one["total"], *(one["parts"][part] for part in PARTS))
                table.add_row(label, *(f"{figure:.2f}" for figure in figures), f"{one['tokens']:.0f}")
    console.print(table)
    if not quick and not profiled:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
