"""Defines the engine: the generation loop over a loaded model.

    engine = Engine(load_model(…), EngineLimits(max_rows=…))
    engine.generate([Request(…), …])                      # or:
    engine.submit(request); engine.step() -> completions  # used by generate() and by the unit runner

Each row is independent: it has its own mode, time, step, block, end and seed. Its tokens do not depend on the rows
that are generated beside it.
"""

from model.engine.loop import Loop
from model.engine.model_runner import ModelRunner
from model.engine.scheduler import Scheduler, longest_context
from model.errors import RequestError
from model.memory.planner import plan_memory
from model.network.two_tower import TwoTower
from model.requests import EngineLimits, Request
from model.runtime.page_allocator import PREFIX_SLOTS

AR_TOKENS = 8
"""The number of tokens that a row in AR mode generates in one turn, if the model is on one GPU. The host then works
once for eight tokens, and a row that ends has computed three or four tokens in vain on average. In all other cases the
number is one: on a CPU there is no device to keep busy, and with several stages the lanes keep the devices busy."""
OVERLAP_ROWS = 64
"""If a lane has at least so many rows, its context forward is launched before its last denoiser forward is collected.
From about this many rows of 16 tokens a GPU spends more time computing than reading weights (990 TFLOP/s over 4.8 TB/s
at the released size: about 1,000 tokens), so a forward over fewer rows is shorter. Used only on a GPU with one lane,
and only if extend_every is 1: otherwise finished blocks wait anyway."""


class Engine(Loop):
    """The generation loop over one loaded model, with a memory plan (`memory`), a context cache and a number of lanes
    that suit the model's devices."""

    def __init__(
        self,
        tower_pair: TwoTower,
        limits: EngineLimits | None = None,
        *,
        trace: bool = False,
        ar_tokens: int | None = None,
        overlap_rows: int | None = None,
    ) -> None:
        """Plan the memory, make the context cache and set up the loop.

        limits: None for the defaults. trace: completions carry the block that each denoiser forward read. ar_tokens,
        overlap_rows: see model.engine.loop; None selects the values that suit the devices. They change the speed, never
        the tokens. Raises RequestError if the limits contradict the model or do not fit into the memory of its devices.
        """
        self.pair = tower_pair
        self.limits = limits or EngineLimits()
        self.max_context = self.limits.context_tokens(tower_pair.config.max_position_embeddings)
        self.memory = plan_memory(tower_pair, self.limits)
        self.kv_tokens, rows = self.memory.kv_tokens, self.memory.max_rows
        self.cache = tower_pair.new_cache(slots=rows + PREFIX_SLOTS, kv_tokens=self.kv_tokens)
        lanes = min(self.limits.lanes or len(tower_pair.stages), rows)
        on_gpu, stages = tower_pair.devices[0].type == "cuda", len(tower_pair.stages)
        if ar_tokens is None:
            ar_tokens = AR_TOKENS if on_gpu and stages == 1 else 1
        if overlap_rows is None and on_gpu and lanes == 1 and self.limits.extend_every == 1:
            overlap_rows = OVERLAP_ROWS
        super().__init__(
            ModelRunner(tower_pair, self.cache, trace=trace),
            Scheduler(self.cache.allocator, rows, self.limits.max_prefill_tokens, lanes),
            tower_pair.tokenizer.decode if tower_pair.tokenizer else None,
            extend_every=self.limits.extend_every,
            ar_tokens=ar_tokens,
            overlap_rows=overlap_rows,
        )

    def check_request(self, request: Request) -> None:
        """Raise RequestError if the request could never run on this engine.

        The prompt must have tokens, all in the vocabulary. Prompt and max_new_tokens together, and a block in diffusion
        mode, must fit in the context. The mode and the stop strings must suit the loaded model.
        """
        params, prompt = request.params, request.prompt_ids
        vocabulary = self.pair.config.vocab_size
        room, limit, other = self.max_context, "the context", ""
        if self.kv_tokens < room:  # only if kv_tokens was given: a message must not depend on max_rows
            room, limit, other = self.kv_tokens, "engine.kv_tokens", ", or raise engine.kv_tokens"
        if not len(prompt):
            raise RequestError(f"request {request.key!r}: the prompt has no tokens")
        if longest_context(request) > room:
            raise RequestError(
                f"request {request.key!r}: {len(prompt)} prompt tokens and max_new_tokens {params.max_new_tokens} "
                f"exceed {limit} of {room} tokens; shorten the prompt or lower max_new_tokens{other}"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(i for i in prompt if not 0 <= i < vocabulary)
            raise RequestError(f"request {request.key!r}: token id {wrong} is outside the vocabulary of {vocabulary}")
        if params.mode == "diffusion" and params.block_size > self.max_context:
            raise RequestError(
                f"request {request.key!r}: block_size is {params.block_size}, above the context of {self.max_context} "
                "tokens; lower block_size"
            )
        if params.mode != "ar" and self.pair.denoiser is None:
            raise RequestError(
                f"mode is {params.mode!r}, but the model was loaded without its denoiser tower: use mode 'ar', or load "
                "both towers"
            )
        if params.stop and self._decode is None:
            raise RequestError(
                "stop strings need a tokenizer, but the checkpoint has no tokenizer.json: leave out stop or add it"
            )
