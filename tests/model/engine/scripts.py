"""What the scripted model of the loop's tests says to each request, and what must come of that. Free of torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from model.requests import FinishReason, GenerationParams, Request

EOS, MASK = 1, 0
FIRST = 100  # scripted tokens start here


@dataclass(frozen=True, slots=True)
class Script:
    """What the model would say to one request."""

    steps: tuple[int, ...] = (1,)
    """Forwards that its blocks take, block after block, and from the start again."""
    eos_at: int | None = None
    """The completion token that is an EOS."""
    broken_block: int | None = None
    """The block whose logits are not finite."""

    def block(self, start: int, size: int) -> list[int]:
        """The completion's tokens from `start` on."""
        return [EOS if i == self.eos_at else FIRST + i for i in range(start, start + size)]

    def needed(self, params: GenerationParams, number: int) -> int:
        """Forwards that block `number` takes to be full."""
        most = params.steps_per_block if params.mode == "diffusion" else 1
        return min(most, self.steps[number % len(self.steps)])


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be told of a request, whatever happened around it."""

    token_ids: tuple[int, ...]
    reason: FinishReason
    steps: tuple[int, ...]
    forwards: int


def size_of(params: GenerationParams) -> int:
    """Positions of a block."""
    return params.block_size if params.mode == "diffusion" else 1


def confidence(token: int) -> float:
    """With what probability a scripted token is chosen."""
    return token % 7 / 8


def expected(params: GenerationParams, script: Script) -> Expected:
    """Follows the script by itself, a block and a step at a time."""
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
    """A prompt of its own, behind `shared` tokens, `length` tokens in all."""
    start = list(shared)[:length]
    own = sum(map(ord, key)) * 7919
    return start + [5000 + (own + i) % 9973 for i in range(length - len(start))]


def request(key: str, length: int, *, shared: Iterable[int] = (), prefix_tokens: int = 0, **params: object) -> Request:
    """A request with a prompt of its own and EOS as the end."""
    settings = {"eos_ids": (EOS,), "block_size": 8, "steps_per_block": 8, **params}
    return Request(key, prompt(key, length, shared), GenerationParams(**settings), prefix_tokens)  # type: ignore[arg-type]
