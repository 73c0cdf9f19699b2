"""Scores a checkpoint's completions of held-out prompts against the right answers and against its own AR mode."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model import Engine, EngineLimits, GenerationParams, Request
from model.builtin.tasks import Example
from model.network.two_tower import TwoTower
from model.requests import Completion
from pipeline.core.repetition import DEGENERATE, repetition

MAX_NEW_TOKENS = 208
"""Maximum tokens of a completion, above the longest answer."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of the completions of one mode and setting."""

    rows: int
    exact_match: float
    """Share of rows that ended by themselves and whose text is exactly the right answer."""
    agreement_with_ar: float
    """Share of rows with the same text as in AR mode."""
    tokens_per_forward: float | None
    """Tokens of all completions divided by all their denoiser forwards; None in AR mode."""
    degenerate: float
    """Share of rows whose `repetition` is at least DEGENERATE."""
    tasks: dict[str, tuple[float, float | None]]
    """Task -> exact match, and tokens per forward (None in AR mode)."""
    blocks_by_steps: dict[int, int]
    """Denoiser forwards of a block -> number of blocks."""


def generate(pair: TwoTower, examples: Sequence[Example], params: GenerationParams) -> list[Completion]:
    """Return a completion for each example, in their order. Raises ValueError if one failed."""
    assert pair.tokenizer is not None
    prompts = pair.tokenizer.encode_batch([example.prompt for example in examples])
    requests = [Request(str(i), ids, params) for i, ids in enumerate(prompts)]
    done = {c.key: c for c in Engine(pair, EngineLimits(max_rows=64, max_context_tokens=1024)).generate(requests)}
    completions = [done[request.key] for request in requests]
    for completion in completions:
        if completion.error is not None:
            raise ValueError(f"row {completion.key} failed: {completion.error}")
    return completions


def score(examples: Sequence[Example], completions: Sequence[Completion], ar: Sequence[Completion]) -> Score:
    """Score the completions of the examples. `ar`: the completions of the same examples in AR mode."""
    rows = list(zip(examples, completions, strict=True))
    right = [done.text == example.answer and done.finish_reason == "stop" for example, done in rows]
    tasks = {}
    for task in dict.fromkeys(example.task for example in examples):
        mine = [i for i, example in enumerate(examples) if example.task == task]
        tasks[task] = (sum(right[i] for i in mine) / len(mine), _rate([completions[i] for i in mine]))
    return Score(
        rows=len(rows),
        exact_match=sum(right) / len(rows),
        agreement_with_ar=sum(a.text == b.text for a, b in zip(completions, ar, strict=True)) / len(rows),
        tokens_per_forward=_rate(completions),
        degenerate=sum(repetition(done.token_ids) >= DEGENERATE for done in completions) / len(rows),
        tasks=tasks,
        blocks_by_steps=dict(sorted(Counter(count for done in completions for count in done.steps_per_block).items())),
    )


def _rate(completions: Sequence[Completion]) -> float | None:
    forwards = sum(done.denoiser_forwards for done in completions)
    return sum(len(done.token_ids) for done in completions) / forwards if forwards else None
