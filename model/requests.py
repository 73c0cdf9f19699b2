"""Defines what goes into the engine (requests with their generation settings, and the engine's limits) and what comes
out (completions and EngineError). The data classes are frozen. Does not import torch."""

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
_TOO_MANY = 2**31  # counts and token ids must be below this, so that they fit in signed 32-bit numbers
_TOO_HOT = 3e38  # largest temperature, just below the largest float32
MAX_STOPS, MAX_STOP_CHARS = 256, 4096
"""The largest number of stop strings of a request, and of characters in each. They are limited because a row's text is
searched for all of them whenever the row has new tokens."""
_SHOWN_CHARS = 80  # characters of a wrong value that a message shows at most


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
    """The settings for generating one row. Each value is used exactly as given, never clamped.

    block_size, steps_per_block and confidence_threshold have an effect in diffusion mode only. Raises RequestError,
    which names the field and the value, if a value is impossible.
    """

    mode: Mode = "diffusion"
    """The generation mode. diffusion: the denoiser tower fills blocks. ar: the context tower alone predicts one token
    after another. mock_ar: the denoiser tower predicts one token after another."""
    max_new_tokens: int = 256
    """Largest number of tokens in the completion; it need not be a multiple of block_size."""
    block_size: int = 16
    """Tokens per block (S). The released model was trained with 16, and its output degenerates above that."""
    steps_per_block: int = 16
    """Largest number of denoiser forwards per block (T); the last one commits everything that is still masked."""
    confidence_threshold: float = 0.9
    """A step commits every prediction with a probability strictly above this (gamma), at least the most confident one,
    and as many as steps_per_block needs."""
    temperature: float = 0.0
    """Sampling temperature: 0 is greedy; above 0, tokens are sampled from softmax(logits / temperature)."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from; None or 0: all tokens. Without effect at temperature 0."""
    top_p: float | None = None
    """Total probability that the tokens to sample from must reach: the fewest likeliest tokens that reach it are kept.
    None or 1: all tokens. Without effect at temperature 0."""
    seed: int = 0
    """Sampling seed: the random number of a token depends on (seed, row key, block, step, position) and nothing
    else."""
    eos_ids: tuple[int, ...] = ()
    """Token ids that end a row. If it is empty or None, only a stop string or max_new_tokens ends the row."""
    stop: tuple[str, ...] = ()
    """Strings that end a row; the completion's text ends before the first of them. At most MAX_STOPS strings, each of 1
    to MAX_STOP_CHARS characters; None counts as none."""

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
            "a number above 0 and at most 1",
        )
        _require(_is_int(self.seed) and 0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        object.__setattr__(self, "eos_ids", _as_tuple(self.eos_ids, "eos_ids", int))
        object.__setattr__(self, "stop", _as_tuple(self.stop, "stop", str))
        _require(all(_is_int(i) and 0 <= i < _TOO_MANY for i in self.eos_ids), "eos_ids", self.eos_ids, "token ids")
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has more than {MAX_STOPS} strings: give fewer")
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "strings that are not empty")
        if (longest := max(map(len, self.stop), default=0)) > MAX_STOP_CHARS:
            raise RequestError(f"stop has a string of {longest} characters: at most {MAX_STOP_CHARS} are allowed")


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
    """One row to generate. Raises RequestError if a field has a wrong type or prefix_tokens exceeds the prompt; the
    engine checks the rest when the request is submitted."""

    key: str
    """Identifies the row in completions and errors. Sampling depends on it beside the seed. No two requests that an
    engine holds at the same time may have the same key."""
    prompt_ids: Sequence[int]
    """Token ids of the prompt; they are copied to a tuple."""
    params: GenerationParams = field(default_factory=GenerationParams)
    prefix_tokens: int = 0
    """Number of tokens at the start of the prompt that other requests begin with as well. The engine computes the whole
    pages among them once for all these requests, if one of its few slots for prefixes is free. This changes the speed,
    never the tokens."""

    def __post_init__(self) -> None:
        _require(isinstance(self.key, str), "request key", self.key, "a string")
        name = f"request {self.key!r}:"
        _require(isinstance(self.params, GenerationParams), f"{name} params", self.params, "GenerationParams")
        unordered = isinstance(self.prompt_ids, (Set, Mapping))
        _require(not unordered, f"{name} prompt_ids", self.prompt_ids, "a list of whole numbers, not a set or a dict")
        try:  # a copy, so that a submitted prompt cannot change any more
            object.__setattr__(self, "prompt_ids", tuple(map(operator.index, self.prompt_ids)))
        except TypeError as error:
            raise RequestError(f"{name} the prompt must be a list of whole numbers: {error}") from error
        _require(
            _is_int(self.prefix_tokens) and 0 <= self.prefix_tokens <= len(self.prompt_ids),
            f"{name} prefix_tokens",
            self.prefix_tokens,
            f"a whole number from 0 to {len(self.prompt_ids)}, the length of the prompt",
        )

    @property
    def sampling_key(self) -> tuple[int, int]:
        """Return a hash of (seed, row key) as two 32-bit words: the key for the counter-based random numbers of the row
        (model.network.sampling)."""
        digest = hashlib.blake2b(f"{self.params.seed}\0{self.key}".encode(errors="surrogatepass"), digest_size=8)
        words = digest.digest()
        return int.from_bytes(words[:4], "little"), int.from_bytes(words[4:], "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The result of one request. Times are in seconds.

    prefill_s, denoise_s and commit_s add up the full durations of the forwards that the row took part in, although
    other rows shared them. On a CPU a forward lasts from its start on the first stage to its end on the last one; on
    GPUs the times of all stages are added. With several stages forwards overlap, even those of one long prompt, so the
    sum may exceed latency_s.
    """

    key: str
    """The key of the request."""
    token_ids: tuple[int, ...] = ()
    """The generated ids, up to and including the EOS or the token that completed a stop string. In an error row, the
    ids of the finished blocks, or in AR mode all ids before the error."""
    text: str | None = None
    """The decoded text, which ends before the EOS or stop string; None in an error row, and if the checkpoint has no
    tokenizer."""
    finish_reason: FinishReason
    """stop: an EOS or a stop string ended the row. length: it reached max_new_tokens. error: see `error`."""
    error: str | None = None
    """The reason for finish_reason error; otherwise None."""
    prompt_tokens: int = 0
    denoiser_forwards: int = 0
    """Number of denoiser forwards that the row took part in; 0 in AR mode."""
    steps_per_block: tuple[int, ...] = ()
    """Number of denoiser forwards that each block took; empty in the modes ar and mock_ar."""
    forced_commits: int = 0
    """Number of tokens in token_ids that were committed although their confidence was not above the threshold, because
    each step commits at least one token and as many as the limit of steps needs; 0 in the modes ar and mock_ar."""
    mean_confidence: float | None = None
    """Mean probability of the tokens in token_ids when they were chosen (at temperature 1; in diffusion mode without
    the mask id); None if there are none."""
    queue_s: float = 0.0
    """Time from submit() until the row got the slot in which it ended."""
    prefill_s: float = 0.0
    """Time of the context forwards over the row's prompt."""
    denoise_s: float = 0.0
    """Time of the row's denoiser forwards."""
    commit_s: float = 0.0
    """Time of the context forwards after the prefill: those over finished blocks, and in AR mode those that predict the
    tokens."""
    latency_s: float = 0.0
    """Time from submit() to the end, queue_s included."""
    batch_rows: float = 0.0
    """Mean number of rows in the forwards that this row took part in after its prefill; 0 if there were none."""
    preemptions: int = 0
    """Number of times that the row was preempted because pages or memory ran out. Work before the last preemption is
    not counted; its time is part of queue_s."""
    trace: tuple[tuple[int, ...], ...] = ()
    """The token ids of the row's block as each denoiser forward read them; empty unless the engine was made with
    trace=True."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The limits on what the engine holds and computes at once. Raises RequestError if they are impossible or
    contradict each other."""

    max_rows: int | Literal["auto"] = 16
    """Largest number of rows generated together; auto: as many as fit in memory, up to the number from which more rows
    would bring no more speed (model.memory.planner)."""
    max_prefill_tokens: int = 4096
    """Largest number of prompt tokens in one forward of the context tower, padding included; a longer prompt is
    processed in pieces. At least one page of the context cache, 64; the engine rounds it down to whole pages."""
    max_context_tokens: int | None = None
    """Largest number of tokens of one row, prompt and completion together. If None, it is the checkpoint's
    max_position_embeddings."""
    kv_tokens: int | None = None
    """Tokens of attention context for all rows together. If None, there are enough for max_rows contexts of the largest
    size, or as many as fit in memory if that is less."""
    lanes: int | None = None
    """Number of lanes. A lane is a group of rows whose forwards are launched together; with one lane per stage, every
    stage has work while the others compute. If None, there is one per stage."""
    extend_every: int = 2
    """Number of turns of a lane from one context forward to the next; fewer if the lane has nothing to denoise, has
    rows in AR mode, or if many prompts wait. With 2, a finished block may wait for one turn, but twice as many blocks
    share the fixed cost of such a forward, above all the reading of the weights."""

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
        """Return the largest number of tokens, prompt and completion together, that a request may ask for:
        `context_tokens`, or kv_tokens if that is given and lower. Raises RequestError as `context_tokens` does."""
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
    """Work of the engine for some rows failed, such as a forward, so that these rows are lost.

    `keys` are the keys of the lost rows; all of them have left the engine. `completions` are those of rows that had
    ended but had not been returned yet. The caller must handle both; all other rows continue with the next step.
    """

    def __init__(self, message: str, keys: tuple[str, ...] = (), completions: tuple[Completion, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys
        self.completions = completions
