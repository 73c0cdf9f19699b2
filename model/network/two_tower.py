"""Loads and holds both towers, and runs their two forwards: extend the context, and denoise a block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from model.checkpoint.config import Towers, TwoTowerConfig
from model.checkpoint.loader import Loaded, check_memory, load_towers
from model.checkpoint.reader import Checkpoint, open_checkpoint
from model.checkpoint.tokenizer import Tokenizer
from model.errors import RequestError
from model.kernels import kernels_for
from model.network.context_cache import ContextCache
from model.network.layers.time import Conditioning, TimeConditioning
from model.network.partition import partition
from model.network.tower import Tower
from model.runtime.ragged_batch import RaggedBatch
from model.runtime.stages import Part
from model.runtime.transfer import to_device

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TIME_NAMES = {"embed_in": "t_embedder.mlp.0", "embed_out": "t_embedder.mlp.2", "block": "t_block.1"}


def load_model(
    uri: str, dtype: str = "float32", devices: Sequence[str] = ("cpu",), towers: Towers = "both"
) -> "TwoTower":
    """Load a checkpoint from a built-in name ("builtin:tiny" or "builtin:noise"), a local folder, or any fsspec URL.

    dtype: "float32" or "bfloat16", for all weights but the few that always need more precision. devices: one for each
    stage; the weights of both towers are divided among them about equally. towers: "context" loads only what AR mode
    needs, half of the weights. Raises CheckpointError if the checkpoint cannot be loaded or does not fit into memory,
    and RequestError if dtype, devices or towers is wrong.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if towers not in ("both", "context"):
        raise RequestError(f"towers is {towers!r}: it must be 'both' or 'context'")
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise RequestError(f"devices is {devices!r}: it must be a list such as ['cpu'] or ['cuda:0', 'cuda:1']")
    places = [_device(name) for name in devices]
    if len({place.type for place in places}) > 1:
        raise RequestError(f"devices are {', '.join(devices)}: all must be 'cpu', or all 'cuda:N'")
    checkpoint = open_checkpoint(uri)
    checkpoint.validate(towers)
    check_memory(checkpoint, towers, DTYPES[dtype], places)
    pair = TwoTower(checkpoint.config, DTYPES[dtype], places, towers)
    pair.loaded = load_towers(checkpoint, pair.checkpoint_targets())
    pair.share_time()
    pair.tokenizer = _tokenizer(checkpoint)
    return pair


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RequestError(f"device is {name!r}: it must be 'cpu' or 'cuda:N'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device is {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    raw = checkpoint.tokenizer_json()
    return None if raw is None else Tokenizer(raw)


@dataclass(frozen=True, slots=True)
class Stage:
    """A device, and the range of layers of each tower that run on it.

    Layers with a state are on the same stage in both towers (see model.network.partition).
    """

    device: torch.device
    context: range
    denoiser: range


class TwoTower(nn.Module):
    """The context tower and, unless the model is for AR mode only, the denoiser tower with its time conditioning.

    Denoiser layer i reads only the context's state at layer i, which is on the same stage, so only hidden states pass
    from stage to stage. All denoiser layers need the time conditioning, so every stage has a copy of it. The weights
    are uninitialised until `load_model` or `random_pair` fills them.
    """

    def __init__(
        self, config: TwoTowerConfig, dtype: torch.dtype, devices: Sequence[torch.device], towers: Towers = "both"
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        parts = partition(config, len(devices), towers)
        self.stages = [Stage(device, *ranges) for device, ranges in zip(devices, parts, strict=True)]
        self.devices = [stage.device for stage in self.stages for _ in stage.context]
        self.tokenizer: Tokenizer | None = None
        self.loaded: tuple[Loaded, ...] = ()
        """A record of size and time for each tower that was loaded; empty if no checkpoint was loaded."""
        self.context = Tower(config, self.devices, dtype, causal=True)
        self.denoiser: Tower | None = None
        if towers == "both":
            devices_of_layers = [stage.device for stage in self.stages for _ in stage.denoiser]
            self.denoiser = Tower(config, devices_of_layers, dtype, causal=False)
            self.times = nn.ModuleList()
            for stage in self.stages:
                with stage.device:
                    self.times.append(TimeConditioning(config, dtype, kernels_for(stage.device)))
            self.times.requires_grad_(False)
            self.tables = nn.ParameterList(  # one for each stage: (layers of the stage, 3, H)
                nn.Parameter(
                    torch.empty(len(stage.denoiser), 3, config.hidden_size, dtype=dtype, device=stage.device),
                    requires_grad=False,
                )
                for stage in self.stages
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, from eos_token_id of the checkpoint's config.json; empty if it names none."""
        return self.config.eos_token_ids

    def new_cache(self, *, slots: int, kv_tokens: int) -> ContextCache:
        """Return an empty context cache on this model's devices, for `slots` rows and `kv_tokens` tokens in total."""
        return ContextCache(self.config, self.devices, self.dtype, slots=slots, kv_tokens=kv_tokens)

    def checkpoint_targets(self) -> dict[str, Tensor]:
        """Map the name of each tensor in the checkpoint to the tensor here that it is loaded into.

        Each expert's tensor is loaded into a slice of one tensor. If the model was loaded for AR mode only, the tensors
        of the denoiser and of the time conditioning are left out.
        """
        targets = self.context.checkpoint_targets("context_tower", "context_lm_head")
        if self.denoiser is not None:
            targets |= self.denoiser.checkpoint_targets("denoiser_tower", "lm_head")
            for name, parameter in self.times[0].named_parameters():  # the other stages have copies: share_time()
                module, _, last = name.partition(".")
                targets[f"{_TIME_NAMES[module]}.{last}"] = parameter.data
            tables = [table for stage in self.tables for table in stage.data]
            targets |= {f"scale_shift_tables.{i}": table for i, table in enumerate(tables)}
        return targets

    def share_time(self) -> None:
        """Copy the first stage's time conditioning to all other stages, because loading fills only the first one."""
        if self.denoiser is not None:
            for time in self.times[1:]:
                time.load_state_dict(self.times[0].state_dict())

    def extend(self, cache: ContextCache, rows: RaggedBatch, tokens: Tensor) -> Tensor:
        """Run the context tower over tokens (N,) int64 and return hidden (N, H), for `context.logits`.

        The tokens are added to the contexts of their rows.
        """
        hidden = _run(self.extend_parts(cache, rows), tokens)
        cache.grow(rows)
        return hidden

    def denoise(self, cache: ContextCache, rows: RaggedBatch, tokens: Tensor, t: Tensor) -> Tensor:
        """Run one denoiser forward over the rows' blocks and return hidden (N, H); the cache is only read.

        tokens (N,) int64: committed ids and mask ids. t (R,) float32, on the host: the masked fraction of each row's
        block, or NaN for a row that runs without time conditioning (mock-AR).
        """
        return _run(self.denoise_parts(cache, rows, t), tokens)

    def extend_parts(self, cache: ContextCache, rows: RaggedBatch) -> list[Part]:
        """Return `extend` as one function per stage, to be called in order, for example by model.runtime.stages.

        The first one takes the tokens, each later one what the one before it returned, and the last one returns hidden.
        The caller must call `cache.grow` when they have been launched.
        """

        def part(x: Tensor, stage: int) -> Tensor:
            return self.extend_layers(cache, rows, self.enter("context", x, stage), stage)

        return [partial(part, stage=stage) for stage in range(len(self.stages))]

    def denoise_parts(self, cache: ContextCache, rows: RaggedBatch, t: Tensor) -> list[Part]:
        """Return `denoise` as one function per stage, to be called as those of `extend_parts`, but without
        `cache.grow`, because the cache is only read. t is on the host."""
        conditioned = not bool(t.isnan().all())
        # rows with the same t, such as all new blocks, are computed once; a NaN is not equal to any other
        values, which = t.unique(return_inverse=True)

        def part(x: Tensor, stage: int) -> Tensor:
            hidden, device = self.enter("denoiser", x, stage), self.stages[stage].device
            times = (to_device(values, device), to_device(which, device)) if conditioned else None
            return self.denoise_layers(cache, rows, hidden, times, stage)

        return [partial(part, stage=stage) for stage in range(len(self.stages))]

    def enter(self, tower: Literal["context", "denoiser"], x: Tensor, stage: int) -> Tensor:
        """Move the input `x` of a stage to its device and return hidden (N, H).

        In the first stage x is tokens (N,), which are embedded; in all others it is hidden already.
        """
        device = self.stages[stage].device
        x = x.to(device, non_blocking=True) if x.is_cuda else to_device(x, device)
        if stage:
            return x
        embedded: Tensor = self._tower(tower).embed(x)
        return embedded

    def extend_layers(self, cache: ContextCache, rows: RaggedBatch, hidden: Tensor, stage: int) -> Tensor:
        """Run the context tower's layers of one stage, hidden (N, H) -> (N, H), and store the rows' tokens in `cache`.

        The caller must call `cache.grow` when the layers of all stages have been launched.
        """
        return self.context.run(hidden, self.stages[stage].context, cache.layers, rows)

    def denoise_layers(
        self,
        cache: ContextCache,
        rows: RaggedBatch,
        hidden: Tensor,
        times: tuple[Tensor, Tensor | None] | None,
        stage: int,
    ) -> Tensor:
        """Run the denoiser's layers of one stage, hidden (N, H) -> (N, H).

        times: U values of t (U,), and for each row the index of its value (R,), both on the stage's
        device. If the second is None, row r has value r. times is None if all rows run without time conditioning.
        """
        conditioning = None
        if times is not None:
            values, which = times
            shared = self.times[stage](values.nan_to_num())
            conditioning = Conditioning(shared, values.isnan(), self.tables[stage], which)
        return self._tower("denoiser").run(hidden, self.stages[stage].denoiser, cache.layers, rows, conditioning)

    def _tower(self, name: Literal["context", "denoiser"]) -> Tower:
        tower = self.context if name == "context" else self.denoiser
        assert tower is not None, "loaded without the denoiser tower"
        return tower

    @torch.inference_mode()
    def context_logits(self, prompt_ids: Sequence[int]) -> Tensor:
        """Return the context tower's logits for the token after each position of a prompt: S ids -> (S, V) float32."""
        cache, slot = self._one_row(prompt_ids)
        hidden = self.extend(cache, cache.rows([slot], [len(prompt_ids)]), _ids(prompt_ids))
        return self.context.logits(hidden)

    @torch.inference_mode()
    def denoiser_logits(self, prompt_ids: Sequence[int], block_ids: Sequence[int], t: float) -> Tensor:
        """Return the denoiser's logits for each position of a block of L ids after a prompt: (L, V) float32.

        t: the masked fraction of the block; NaN runs without time conditioning. The mask id is not suppressed. The
        prompt may be empty. Raises RequestError if the model was loaded for AR mode only.
        """
        return self._denoiser_logits(prompt_ids, block_ids, t)

    @torch.inference_mode()
    def mock_ar_logits(self, prompt_ids: Sequence[int]) -> Tensor:
        """Return the denoiser's logits (V,) float32 for the token after a prompt of at least one id (mock-AR mode).

        The denoiser reads the last token without time conditioning, with the earlier tokens as its context. Raises
        RequestError if the model was loaded for AR mode only.
        """
        return self._denoiser_logits(prompt_ids[:-1], prompt_ids[-1:], float("nan"))[0]

    def _denoiser_logits(self, context_ids: Sequence[int], block_ids: Sequence[int], t: float) -> Tensor:
        if self.denoiser is None:
            raise RequestError("the model was loaded with towers='context': it has no denoiser; use towers='both'")
        cache, slot = self._one_row(context_ids)
        if len(context_ids):
            self.extend(cache, cache.rows([slot], [len(context_ids)]), _ids(context_ids))
        rows = cache.rows([slot], [len(block_ids)])
        return self.denoiser.logits(self.denoise(cache, rows, _ids(block_ids), torch.tensor([t])))

    def _one_row(self, prompt_ids: Sequence[int]) -> tuple[ContextCache, int]:
        cache = self.new_cache(slots=1, kv_tokens=max(1, len(prompt_ids)))
        slot = cache.allocator.acquire(len(prompt_ids))
        assert slot is not None
        return cache, slot


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64)


def _run(parts: Sequence[Part], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x
