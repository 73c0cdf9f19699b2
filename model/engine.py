"""The engine: rows come and go, and each turn of the loop runs what every row needs next.

    admit -> prefill -> denoise -> extend -> emit

A row is independent: its own mode, time, step, block, end and seed; rows in different steps of different blocks share a
forward, a finished block goes to the context while other rows keep denoising, and a finished row's slot is refilled in
the next turn. What a row generates depends on the row alone.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.ending import find_end
from model.errors import EngineError, RequestError
from model.params import Completion, EngineLimits, Request
from model.sampling import Draws, choose
from model.scheduler import ActiveRow, Scheduler, longest_context
from model.two_tower import TwoTower
from model.unmasking import positions_to_commit
from model.weights import free_memory

KV_SHARE = 0.25  # of the free memory, at most, for attention context whose size nobody gave


class Engine:
    """Generates completions for requests on one loaded model. Not thread-safe: one thread submits and steps."""

    def __init__(self, tower_pair: TwoTower, limits: EngineLimits | None = None, *, trace: bool = False) -> None:
        """trace: completions carry the block fed to each denoiser forward."""
        self.pair = tower_pair
        self.limits = limits or EngineLimits()
        self.trace = trace
        self.max_context = self.limits.context_tokens(tower_pair.config.max_position_embeddings)
        self.kv_tokens = self.limits.kv_tokens or self._default_kv_tokens()
        self.cache = tower_pair.new_cache(slots=self.limits.max_rows, kv_tokens=self.kv_tokens)
        self.scheduler = Scheduler(self.cache, self.limits.max_prefill_tokens)
        self._decode = tower_pair.tokenizer.decode if tower_pair.tokenizer else None
        self._finished: list[Completion] = []

    def _default_kv_tokens(self) -> int:
        """Room for every row at full length, or for a share of the free memory where that is less."""
        wanted = self.limits.max_rows * self.max_context
        a_token = self.pair.kv_bytes_per_token()
        if a_token == 0:
            return wanted
        affordable = int(sum(free_memory(d) for d in set(self.pair.devices)) * KV_SHARE) // a_token
        return max(self.max_context, min(wanted, affordable))

    @property
    def waiting(self) -> int:
        """Requests that hold no slot yet."""
        return len(self.scheduler.waiting)

    @property
    def active(self) -> int:
        """Rows that hold a slot."""
        return len(self.scheduler.running)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError where it could never run."""
        self._check(request)
        self.scheduler.submit(request)

    def _check(self, request: Request) -> None:
        params, prompt = request.params, request.prompt_ids
        vocabulary = self.pair.config.vocab_size
        room, limit = self.max_context, "the context"
        if self.kv_tokens < room:  # only where it was given: a text must not depend on max_rows
            room, limit = self.kv_tokens, "engine.kv_tokens"
        if not len(prompt):
            raise RequestError(f"request {request.key!r}: the prompt has no tokens")
        if longest_context(request) > room:
            raise RequestError(
                f"request {request.key!r}: {len(prompt)} prompt tokens and max_new_tokens {params.max_new_tokens} "
                f"exceed {limit} of {room} tokens; shorten the prompt or lower max_new_tokens"
            )
        wrong = next((i for i in prompt if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise RequestError(f"request {request.key!r}: token id {wrong} is outside the vocabulary of {vocabulary}")
        if params.mode == "diffusion" and params.block_size > self.max_context:
            raise RequestError(f"block_size is {params.block_size}, above the context of {self.max_context} tokens")
        if params.mode != "ar" and self.pair.denoiser is None:
            raise RequestError(f"mode is {params.mode!r}, but the model was loaded without its denoiser tower")
        if params.stop and self._decode is None:
            raise RequestError("stop strings need a tokenizer, and the checkpoint has no tokenizer.json")

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs the requests to their ends -> completions in the requests' order.

        Raises RequestError, and runs none, where one of them could never run or the engine holds other rows (drive it
        by submit and step then). After an EngineError the engine is empty.
        """
        if held := self.waiting + self.active:
            raise RequestError(f"generate() needs an idle engine, this one holds {held} rows: use submit() and step()")
        for request in requests:
            self._check(request)
        keys = Counter(request.key for request in requests)
        if doubled := next((key for key, count in keys.items() if count > 1), None):
            raise RequestError(f"request key {doubled!r} is given {keys[doubled]} times: keys must be unique")
        for request in requests:
            self.scheduler.submit(request)
        done: dict[str, Completion] = {}
        try:
            while self.waiting or self.active:
                done |= {completion.key: completion for completion in self.step()}
        finally:
            self.scheduler.clear()  # of what an error left
        return [done[request.key] for request in requests]

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One turn of the loop -> the rows that ended in it.

        Raises EngineError where a forward fails: it names the rows that are lost and holds the completions so far.
        """
        self._finished = []
        self.scheduler.admit()
        self._run(self.scheduler.prefill_batch(), self._prefill)
        self._run(self.scheduler.in_phase("denoise"), self._denoise)
        self._run(self.scheduler.in_phase("extend"), self._extend)
        return self._finished

    def _run(self, rows: list[ActiveRow], phase: Callable[[list[ActiveRow]], None]) -> None:
        if not rows:
            return
        try:
            phase(rows)
        except BaseException as error:  # whatever a device raises, the rows must not stay half-computed
            held = [row for row in rows if self.scheduler.running.get(row.request.key) is row]  # others had ended
            for row in held:
                self.scheduler.remove(row)
            if not isinstance(error, Exception):
                raise
            what = f"{phase.__name__.strip('_')} of {len(rows)} rows failed: {type(error).__name__}: {error}"
            raise EngineError(what, tuple(row.request.key for row in held), tuple(self._finished)) from error

    # -- phases ------------------------------------------------------------------------------------------------------

    def _prefill(self, rows: list[ActiveRow]) -> None:
        """Puts prompts into their contexts."""
        began = time.perf_counter()
        with_tokens = [row for row in rows if row.pending]  # a one-token prompt in an AR mode has none
        if with_tokens:
            self._put_into_context(with_tokens)
        seconds = time.perf_counter() - began
        for row in rows:
            row.prefill_s += seconds
            self._next_forward(row)

    def _denoise(self, rows: list[ActiveRow]) -> None:
        """One denoiser forward for all rows that need one, then the commit rule of each mode."""
        began = time.perf_counter()
        blocks = [row.block if row.block else [row.last_token] for row in rows]
        for row, block in zip(rows, blocks, strict=True):
            row.forwards += 1
            if self.trace:
                row.trace.append(tuple(block))
        t = torch.tensor([sum(row.masked) / len(row.block) if row.block else float("nan") for row in rows])
        batch = self.cache.rows([row.slot for row in rows], [len(block) for block in blocks])
        hidden = self.pair.denoise(self.cache, batch, torch.tensor([i for block in blocks for i in block]), t)
        # logits are wanted at masked positions, and at the one position of a mock-AR row
        wanted = [row.masked if row.block else [True] for row in rows]
        picked = torch.tensor([w for mask in wanted for w in mask])
        assert self.pair.denoiser is not None
        logits = self.pair.denoiser.logits(hidden[picked.to(hidden.device)])
        where = [(row, at) for row, mask in zip(rows, wanted, strict=True) for at, w in enumerate(mask) if w]
        tokens, confidence = self._choose(logits, where)
        self._commit(rows, wanted, tokens, confidence)
        seconds = time.perf_counter() - began
        for row in rows:
            row.denoise_s += seconds
            row.took_part(len(rows))
        self._emit(rows)

    def _extend(self, rows: list[ActiveRow]) -> None:
        """One context forward for finished blocks and for the last tokens of the AR modes."""
        began = time.perf_counter()
        last = self._put_into_context(rows)
        ar = [i for i, row in enumerate(rows) if row.request.params.mode == "ar"]
        if ar:
            logits = self.pair.context.logits(last[torch.tensor(ar, device=last.device)])
            tokens, confidence = self._choose(logits, [(rows[i], 0) for i in ar])
            for i, token, sure in zip(ar, tokens.tolist(), confidence.tolist(), strict=True):
                _append(rows[i], token, sure)
        seconds = time.perf_counter() - began
        for row in rows:
            row.commit_s += seconds
            row.took_part(len(rows))
            self._next_forward(row)
        self._emit([rows[i] for i in ar])

    def _put_into_context(self, rows: list[ActiveRow]) -> Tensor:
        """Extends the contexts by the rows' pending tokens -> hidden (R, H) at each row's last token."""
        lengths = [len(row.pending) for row in rows]
        batch = self.cache.rows([row.slot for row in rows], lengths)
        hidden = self.pair.extend(self.cache, batch, torch.tensor([i for row in rows for i in row.pending]))
        return hidden[torch.tensor(lengths, device=hidden.device).cumsum(0) - 1]

    def _next_forward(self, row: ActiveRow) -> None:
        """What a row needs once its context is up to date."""
        mode = row.request.params.mode
        if mode == "diffusion":
            row.phase = "denoise"
            row.start_block(self.pair.config.mask_token_id)
        elif mode == "mock_ar":
            row.phase = "denoise"
        else:
            row.phase = "extend"
            row.pending = [row.last_token]

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _choose(self, logits: Tensor, where: list[tuple[ActiveRow, int]]) -> tuple[Tensor, Tensor]:
        """logits (M, V) of (row, position in its block) -> tokens and confidences (M,) on the host."""
        device = logits.device
        suppress = torch.tensor([row.request.params.mode == "diffusion" for row, _ in where], device=device)
        draws = _draws(where, device) if any(row.request.params.temperature > 0 for row, _ in where) else None
        tokens, confidence = choose(logits, suppress, self.pair.config.mask_token_id, draws)
        return tokens.cpu(), confidence.cpu()

    def _commit(self, rows: list[ActiveRow], wanted: list[list[bool]], tokens: Tensor, confidence: Tensor) -> None:
        """Applies the commit rule to every row. tokens, confidence (M,): the wanted positions, row after row."""
        longest = max(len(mask) for mask in wanted)
        masked = torch.tensor([mask + [False] * (longest - len(mask)) for mask in wanted])
        chosen = torch.zeros(masked.shape, dtype=torch.int64).masked_scatter_(masked, tokens)
        sure = torch.zeros(masked.shape).masked_scatter_(masked, confidence)
        thresholds = torch.tensor([row.request.params.confidence_threshold for row in rows])
        steps_left = torch.tensor([row.steps_left if row.block else 1 for row in rows])
        commit = positions_to_commit(masked, sure, thresholds, steps_left)
        lists = (commit.tolist(), chosen.tolist(), sure.tolist())
        for row, committed, ids, confidences in zip(rows, *lists, strict=True):
            if row.block:
                _commit_block(row, committed, ids, confidences)
            else:
                row.pending = [row.last_token]
                _append(row, ids[0], confidences[0])

    def _emit(self, rows: list[ActiveRow]) -> None:
        """Ends the rows that are done, and sends finished blocks on to the context."""
        for row in rows:
            if row.broken:
                self._finish(row, row.completion("error", row.tokens, None, _not_finite(row)))
                continue
            tokens = row.committed_prefix()
            end = find_end(tokens, row.request.params, self._decode, row.checked)
            row.checked = len(tokens)
            if end is not None:
                self._finish(row, row.completion(end.reason, end.token_ids, end.text, None))
            elif row.phase == "denoise" and True not in row.masked:
                if row.block:
                    row.finish_block()
                row.phase = "extend"

    def _finish(self, row: ActiveRow, completion: Completion) -> None:
        self.scheduler.remove(row)
        self._finished.append(completion)


def _append(row: ActiveRow, token: int, confidence: float) -> None:
    """Adds a token in an AR mode, unless its confidence is NaN: then it means nothing."""
    if math.isnan(confidence):
        row.broken = True
    else:
        row.tokens.append(token)
        row.confidences.append(confidence)


def _commit_block(row: ActiveRow, committed: list[bool], ids: list[int], confidences: list[float]) -> None:
    """Unmasks the committed positions of a row's block, unless a confidence of it is NaN."""
    row.steps[-1] += 1
    size = len(row.block)
    if any(masked and math.isnan(sure) for masked, sure in zip(row.masked, confidences[:size], strict=True)):
        row.broken = True
        return
    for at in (at for at in range(size) if committed[at]):
        row.block[at], row.masked[at], row.block_confidences[at] = ids[at], False, confidences[at]


def _not_finite(row: ActiveRow) -> str:
    return (
        f"the model's logits were not finite after {len(row.tokens)} tokens: "
        "the kernels or the checkpoint are wrong, or the prompt breaks them"
    )


def _draws(where: list[tuple[ActiveRow, int]], device: torch.device) -> Draws:
    """The sampling settings of each (row, position), and its coordinates in the random sequence."""
    params = [row.request.params for row, _ in where]
    # the AR modes have no blocks or steps: a token is its own block
    counter = [(len(row.steps) - 1, row.steps[-1], at) if row.block else (len(row.tokens), 0, 0) for row, at in where]
    return Draws(
        temperature=torch.tensor([p.temperature for p in params], device=device),
        top_k=torch.tensor([p.top_k or 0 for p in params], device=device),
        top_p=torch.tensor([p.top_p or 1.0 for p in params], dtype=torch.float64, device=device),
        key=torch.tensor([row.key for row, _ in where], device=device),
        counter=torch.tensor(counter, device=device),
    )
