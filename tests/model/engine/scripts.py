"""Defines what the scripted model of the loop's tests generates for a request, and which result must follow. Does not
import torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from model.requests import FinishReason, GenerationParams, Request

EOS, MASK = 1, 0
FIRST = 100  # scripted tokens start here


@dataclass(frozen=True, slots=True)
class Script:
    """The output of the scripted model for one request."""

    steps: tuple[int, ...] = (1,)
    """Number of forwards that each block takes, block after block; after the last number the list starts again."""
    eos_at: int | None = None
    """Index of the completion token that is an EOS."""
    broken_block: int | None = None
    """Index of the block whose logits are not finite."""

    def block(self, start: int, size: int) -> list[int]:
        """Return `size` tokens of the completion from index `start` on."""
        return [EOS if i == self.eos_at else FIRST + i for i in range(start, start + size)]

    def needed(self, params: GenerationParams, number: int) -> int:
        """Return the number of forwards after which block `number` is full."""
        most = params.steps_per_block if params.mode == "diffusion" else 1
        return min(most, self.steps[number % len(self.steps)])


@dataclass(frozen=True, slots=True)
class Expected:
    """The result that a request must have, whatever happens around it."""

    token_ids: tuple[int, ...]
    reason: FinishReason
    steps: tuple[int, ...]
    forwards: int


def size_of(params: GenerationParams) -> int:
    """Return the number of positions in a block."""
    return params.block_size if params.mode == "diffusion" else 1


def confidence(token: int) -> float:
    """Return the probability with which a scripted token is chosen."""
    return token % 7 / 8


def expected(params: GenerationParams, script: Script) -> Expected:
    """Return the expected result, computed from the script alone, block by block and step by step."""
    tokens: list[int] = []
    steps: list[int] = []
    size, number = size_of(params), 0
    reason: FinishReason | None = None
    while reason is None:
        block, needed, step = script.block(len(tokens), size), script.needed(params, number), 0
        while reason is None and step < needed:
            step += 1
            seen = tokens + block[: size * step // needed]
            if number == script.broken_block:
                reason = "error"
            elif EOS in seen[: params.max_new_tokens]:
                reason, tokens = "stop", seen[: seen.index(EOS) + 1]
            elif len(seen) >= params.max_new_tokens:
                reason, tokens = "length", seen[: params.max_new_tokens]
        steps.append(step)
        number += 1
        tokens = tokens if reason else tokens + block
    counted = params.mode != "ar"
    return Expected(tuple(tokens), reason, tuple(steps) if params.mode == "diffusion" else (), counted * sum(steps))


def prompt(key: str, length: int, shared: Iterable[int] = ()) -> list[int]:
    """Return a prompt of `length` tokens: the `shared` tokens first, then tokens that depend on the key."""
    start = list(shared)[:length]
    own = sum(map(ord, key)) * 7919
    return start + [5000 + (own + i) % 9973 for i in range(length - len(start))]


def request(key: str, length: int, *, shared: Iterable[int] = (), prefix_tokens: int = 0, **params: object) -> Request:
    """Return a request with a prompt that depends on its key; its completion ends at EOS."""
    settings = {"eos_ids": (EOS,), "block_size": 8, "steps_per_block": 8, **params}
    return Request(key, prompt(key, length, shared), GenerationParams(**settings), prefix_tokens)  # type: ignore[arg-type]
