"""Defines what goes into the engine and what comes out, as plain frozen data classes. Does not import torch."""

import hashlib
import operator
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, get_args

from model.errors import RequestError, TwoTowerError
from model.runtime.page_allocator import PAGE_SIZE

Mode = Literal["diffusion", "ar", "mock_ar"]
FinishReason = Literal["stop", "length", "error"]
MODES: tuple[str, ...] = get_args(Mode)
_TOO_MANY = 2**31  # counts must fit in 32-bit numbers
_TOO_HOT = 3e38  # just below the largest float32
MAX_STOPS, MAX_STOP_CHARS = 256, 4096
"""Limits on the number of stop strings and on the characters of each: every row is searched for its stop strings at
every step."""
_SHOWN_CHARS = 80


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 1] + "…"
        raise RequestError(f"{name} is {shown}: it must be {rule}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN, and for an integer too large for a float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """The settings for generating one row. All of them are validated; none is clamped or ignored.

    Raises RequestError, which names the field and the value, if a value is impossible.
    """

    mode: Mode = "diffusion"
    """The generation mode. diffusion: the denoiser fills blocks. ar: the context tower alone. mock_ar: the denoiser,
    one token at a time."""
    max_new_tokens: int = 256
    """Largest number of tokens to generate; need not be a multiple of block_size."""
    block_size: int = 16
    """Tokens per block (S). The released model was trained with 16, and its output degenerates above that."""
    steps_per_block: int = 16
    """Largest number of denoiser forwards per block (T); the last one commits everything that is still masked."""
    confidence_threshold: float = 0.9
    """Predictions with a probability strictly above this are committed at once (gamma)."""
    temperature: float = 0.0
    """Sampling temperature: 0 is greedy; above 0, tokens are sampled from softmax(logits / temperature)."""
    top_k: int | None = None
    """Number of likeliest tokens to sample among; None or 0 for all."""
    top_p: float | None = None
    """Total probability of the tokens to sample among: the fewest likeliest ones that reach it; None or 1 for all."""
    seed: int = 0
    """Sampling seed: sampling depends on (seed, row key, block, step, position) and nothing else."""
    eos_ids: tuple[int, ...] = ()
    """Token ids that end a row; if there are none, it runs to max_new_tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a row; the text ends before the first of them. At most MAX_STOPS, each of up to MAX_STOP_CHARS
    characters."""

    def __post_init__(self) -> None:
        _require(isinstance(self.mode, str) and self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        for name in ("max_new_tokens", "block_size", "steps_per_block"):
            value = getattr(self, name)
            _require(_is_int(value) and 1 <= value < _TOO_MANY, name, value, "a whole number of at least 1")
        gamma = self.confidence_threshold
        _require(_is_number(gamma) and 0 <= gamma <= 1, "confidence_threshold", gamma, "a number from 0 to 1")
        _require(
            _is_number(self.temperature) and 0 <= self.temperature <= _TOO_HOT,
            "temperature",
            self.temperature,
            f"a number from 0 to {_TOO_HOT}",
        )
        _require(
            self.top_k is None or (_is_int(self.top_k) and 0 <= self.top_k < _TOO_MANY),
            "top_k",
            self.top_k,
            "a whole number of at least 1, or 0 for no limit",
        )
        _require(
            self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
            "top_p",
            self.top_p,
            "above 0 and at most 1",
        )
        _require(_is_int(self.seed) and 0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        object.__setattr__(self, "eos_ids", _as_tuple(self.eos_ids, "eos_ids", int))
        object.__setattr__(self, "stop", _as_tuple(self.stop, "stop", str))
        _require(all(_is_int(i) and 0 <= i < _TOO_MANY for i in self.eos_ids), "eos_ids", self.eos_ids, "token ids")
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has more than {MAX_STOPS} strings: give fewer")
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "strings that are not empty")
        if (longest := max(map(len, self.stop), default=0)) > MAX_STOP_CHARS:
            raise RequestError(f"stop has a string of {longest} characters: {MAX_STOP_CHARS} are the most")


def _as_tuple(value: object, name: str, item: type) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, item):
        raise RequestError(f"{name} is {value!r}: it must be a list")
    if not isinstance(value, Sequence):
        raise RequestError(f"{name} is {value!r}: it must be a list")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class Request:
    """One row to generate. `key` identifies it in results, is part of its sampling seed, and must be unique in the
    engine."""

    key: str
    prompt_ids: Sequence[int]
    params: GenerationParams = field(default_factory=GenerationParams)
    prefix_tokens: int = 0
    """Number of first prompt tokens that other requests begin with as well: the engine computes them once. This changes
    the speed, never the tokens."""

    def __post_init__(self) -> None:
        _require(isinstance(self.key, str), "request key", self.key, "a string")
        name = f"request {self.key!r}:"
        _require(isinstance(self.params, GenerationParams), f"{name} params", self.params, "GenerationParams")
        unordered = isinstance(self.prompt_ids, (Set, Mapping))
        _require(not unordered, f"{name} prompt_ids", self.prompt_ids, "a list of whole numbers, which has an order")
        try:  # a copy, so that a submitted prompt cannot change any more
            object.__setattr__(self, "prompt_ids", tuple(map(operator.index, self.prompt_ids)))
        except TypeError as error:
            raise RequestError(f"{name} the prompt must be a list of whole numbers: {error}") from error
        _require(
            _is_int(self.prefix_tokens) and 0 <= self.prefix_tokens <= len(self.prompt_ids),
            f"{name} prefix_tokens",
            self.prefix_tokens,
            f"from 0 to the prompt's {len(self.prompt_ids)} tokens",
        )

    @property
    def sampling_key(self) -> tuple[int, int]:
        """Return the two 32-bit words that represent (seed, row key) in the counter-based generator
        (model.network.sampling)."""
        digest = hashlib.blake2b(f"{self.params.seed}\0{self.key}".encode(errors="surrogatepass"), digest_size=8)
        words = digest.digest()
        return int.from_bytes(words[:4], "little"), int.from_bytes(words[4:], "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The result of one request. Times are seconds of wall clock.

    prefill_s, denoise_s and commit_s add up the durations of the row's forwards. On a CPU a forward lasts from its
    start on the first stage to its end on the last one; on GPUs the times of all stages are added. With several stages
    forwards overlap, even those of one long prompt, so the sum may exceed latency_s.
    """

    key: str
    token_ids: tuple[int, ...] = ()
    """The generated ids, up to and including the EOS or the token that completed a stop string."""
    text: str | None = None
    """The decoded text, which ends before the EOS or stop string; None if the checkpoint has no tokenizer."""
    finish_reason: FinishReason
    error: str | None = None
    prompt_tokens: int = 0
    denoiser_forwards: int = 0
    steps_per_block: tuple[int, ...] = ()
    """Denoiser forwards that each block took; empty in the AR modes."""
    forced_commits: int = 0
    """Number of tokens committed at or below the confidence threshold, because a step must commit something."""
    mean_confidence: float | None = None
    """Mean probability of the tokens when they were chosen (at temperature 1; in diffusion without the mask id)."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    denoise_s: float = 0.0
    commit_s: float = 0.0
    latency_s: float = 0.0
    """Time from submit() to the end, queue_s included."""
    batch_rows: float = 0.0
    """Mean number of rows in the forwards that this row took part in after its prefill."""
    preemptions: int = 0
    """Number of times that the row was preempted because pages or memory ran out. Work before the last preemption is
    not counted; its time is part of queue_s."""
    trace: tuple[tuple[int, ...], ...] = ()
    """The block fed to each denoiser forward; only from an engine made with trace=True."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The limits on what the engine holds at once. Raises RequestError if they are impossible or contradict each
    other."""

    max_rows: int | Literal["auto"] = 16
    """Number of rows generated together; auto: as many as fit in memory and the device makes use of
    (model.memory.planner)."""
    max_prefill_tokens: int = 4096
    """Largest number of prompt tokens in one forward of the context tower, padding included; a longer prompt is
    processed in pieces. Must be at least one page of the context cache, 64."""
    max_context_tokens: int | None = None
    """Largest number of tokens of one row, prompt and completion together; None: the checkpoint's
    max_position_embeddings."""
    kv_tokens: int | None = None
    """Tokens of attention context for all rows together; None: chosen from max_rows and the context, within memory."""
    lanes: int | None = None
    """Number of lanes: groups of rows that take turns, so that every stage has work while the others compute; None: one
    per stage."""
    extend_every: int = 2
    """Number of turns of a lane from one context forward to the next. With 2, a finished block may wait for one turn,
    but twice as many blocks share the fixed cost of such a forward, above all the reading of the weights."""

    def context_tokens(self, max_position_embeddings: int) -> int:
        """Return the largest number of tokens of one row, prompt and completion together.

        max_position_embeddings: the tokens that a context of the checkpoint can hold. Raises RequestError if
        max_context_tokens is more than that.
        """
        if (self.max_context_tokens or 0) > max_position_embeddings:
            raise RequestError(
                f"max_context_tokens is {self.max_context_tokens}, but the checkpoint's contexts hold "
                f"{max_position_embeddings} tokens at most (max_position_embeddings); lower it"
            )
        return self.max_context_tokens or max_position_embeddings

    def row_tokens(self, max_position_embeddings: int) -> int:
        """Return the same as `context_tokens`, but no more than kv_tokens."""
        most = self.context_tokens(max_position_embeddings)
        return min(most, self.kv_tokens or most)

    def __post_init__(self) -> None:
        lanes = 1 if self.lanes is None else self.lanes
        rows = lanes if self.max_rows == "auto" else self.max_rows
        for name, value, least in (
            ("max_prefill_tokens", self.max_prefill_tokens, PAGE_SIZE),
            ("lanes", lanes, 1),
            ("extend_every", self.extend_every, 1),
        ):
            _require(_is_int(value) and least <= value < _TOO_MANY, name, value, f"a whole number of at least {least}")
        rule = "a whole number of at least 1, or auto"
        _require(_is_int(rows) and 1 <= rows < _TOO_MANY, "max_rows", self.max_rows, rule)
        if lanes > rows:
            raise RequestError(f"lanes is {lanes}, above max_rows {rows}: a lane would have no rows; lower lanes")
        for name in ("max_context_tokens", "kv_tokens"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 2 <= value < 2**50)
            _require(ok, name, value, "a whole number of at least 2")
        if self.max_context_tokens and self.kv_tokens and self.kv_tokens < self.max_context_tokens:
            raise RequestError(
                f"kv_tokens is {self.kv_tokens}, below max_context_tokens {self.max_context_tokens}: "
                "no row of that length could ever run; raise kv_tokens"
            )


class EngineError(TwoTowerError):
    """A step of the engine failed.

    `keys` are the rows that are lost; all of them have left the engine. `completions` are the rows that had ended
    earlier in the same step. The caller must handle both; all other rows go on with the next step.
    """

    def __init__(self, message: str, keys: tuple[str, ...] = (), completions: tuple[Completion, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys
        self.completions = completions
