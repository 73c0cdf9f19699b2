"""Makes the memory plan of an engine at its start: how many rows, and tokens of context, fit beside the weights.

Besides its weights, a device holds the Mamba states of every slot, the pages of keys and values, the temporaries of a
forward, the memory that CUDA graphs keep, and the logits from which tokens are chosen. The device with the least room
sets the limit for all. `python -m model.memory.fit` makes the plan for GPUs that this machine does not have.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from model.checkpoint.config import TwoTowerConfig
from model.checkpoint.loader import free_memory
from model.errors import RequestError
from model.kernels.plain_sampling import LIMITED_BYTES
from model.kernels.protocol import HEAD_WORKSPACE
from model.memory.plan import DevicePlan, MemoryPlan, size_text
from model.memory.workspace import Forward, causal_queries, cuda_forward_bytes, graph_bytes, plain_forward_bytes
from model.network.two_tower import Stage, TwoTower
from model.requests import EngineLimits
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, pages_for

KEPT_BACK: Mapping[str, float] = {"cuda": 0.05, "cpu": 0.5}
"""Share of a device's free memory that the plan leaves free, by type of device. On a GPU it covers fragmentation of the
allocator and workspaces of cuBLAS, which no formula here includes. On a CPU it covers the data that the job reads and
writes, and the other replicas of the node, which count the same memory as free."""
AUTO_MAX_ROWS: Mapping[str, int] = {"cuda": 256, "cpu": 32}
"""Largest number of rows that max_rows "auto" chooses, by type of device. On a GPU, with 256 rows x 16 tokens computing
already takes longer than reading the weights; on a CPU this happens with far fewer rows. More rows would use memory
without a gain in speed."""
AUTO_CONTEXT_TOKENS = 4096
"""Tokens of context that max_rows "auto" assumes for each row, or the longest allowed context if that is shorter. Few
rows are longer; if pages run out nevertheless, the youngest row is preempted."""
BLOCK_TOKENS = 32
"""The number of tokens that the plan assumes for each row in a denoiser forward: twice the block size of the released
model. Larger blocks are allowed, but the plan reserves no memory for them."""


def plan_memory(pair: TwoTower, limits: EngineLimits, free: Mapping[str, int] | None = None) -> MemoryPlan:
    """Return the memory plan for a loaded model.

    free: device name -> free bytes after the weights were loaded. If None, it is what is free now. Raises RequestError
    if the limits do not fit.
    """
    weights: dict[str, int] = {}
    for tensor in (*pair.parameters(), *pair.buffers()):
        name = _name(tensor.device)
        weights[name] = weights.get(name, 0) + tensor.nbytes
    if free is None:
        free = {name: free_memory(name) for name in {_name(stage.device) for stage in pair.stages}}
    return Planner(pair.config, pair.dtype, pair.stages, weights, free, limits).plan()


@dataclass(frozen=True)
class Planner:
    """The calculation of a memory plan from sizes alone: the devices need not exist and nothing is allocated.

    weights: device name -> bytes of the loaded weights. free: device name -> bytes that are free beside them.
    """

    config: TwoTowerConfig
    dtype: torch.dtype
    stages: Sequence[Stage]
    weights: Mapping[str, int]
    free: Mapping[str, int]
    limits: EngineLimits

    @property
    def context(self) -> int:
        """Return the largest number of tokens of one row. Raises RequestError if the limits exceed the checkpoint's."""
        return self.limits.context_tokens(self.config.max_position_embeddings)

    def plan(self) -> MemoryPlan:
        """Return the plan. Without kv_tokens in the limits, it has room for the longest context in each row, or as much
        as fits, but at least one such context. Raises RequestError if the limits do not fit."""
        asked = self.limits.max_rows
        rows = self._auto_rows() if asked == "auto" else asked
        devices = self.devices(rows)
        room = _room(devices, rows)
        if room is not None and room < _in_pages(self.limits.kv_tokens or self.context):
            raise RequestError(self._refusal(rows))
        kv_tokens = self.limits.kv_tokens
        if kv_tokens is None:
            wanted = rows * _in_pages(self.context)
            kv_tokens = wanted if room is None else min(wanted, room)
        return MemoryPlan(devices, rows, kv_tokens)

    def devices(self, rows: int) -> tuple[DevicePlan, ...]:
        """Return the share of each device if the engine holds `rows` rows."""
        names = dict.fromkeys(_name(stage.device) for stage in self.stages)
        return tuple(self._device(name, [s for s in self.stages if _name(s.device) == name], rows) for name in names)

    def _device(self, name: str, stages: list[Stage], rows: int) -> DevicePlan:
        config, size = self.config, self.dtype.itemsize
        kinds = [config.layer_kinds[i] for stage in stages for i in stage.context]
        ssm = config.mamba_inner * config.ssm_state_size * 4  # float32 whatever the dtype
        return DevicePlan(
            device=name,
            free=self.free[name],
            kept_back=int(self.free[name] * KEPT_BACK[torch.device(name).type]),
            weights=self.weights.get(name, 0),
            states_per_row=kinds.count("mamba") * (config.conv_dim * config.conv_kernel * size + ssm),
            kv_per_token=kinds.count("attention") * 2 * config.kv_inner * size,
            logits=self._logits(torch.device(name).type, rows) if self.stages[-1] in stages else 0,
            # each stage runs one forward at a time, but stages that share a device may run at once
            workspace=sum(self._workspace(stage, rows) for stage in stages),
            graphs=sum(self._graphs(stage, rows) for stage in stages),
        )

    def _lane_rows(self, rows: int) -> int:
        """Return the largest number of rows of a lane if there are `rows` in all; a new row always joins the lane with
        the fewest rows."""
        return -(-rows // (self.limits.lanes or len(self.stages)))

    def _logits(self, kind: str, rows: int) -> int:
        """Return the bytes of the logits of a lane's forward and their temporaries. kind: the type of device.

        A GPU keeps the logits in the model's dtype; a CPU may also have to sort them. Neither takes more than
        HEAD_WORKSPACE at once.
        """
        each = self.dtype.itemsize if kind == "cuda" else LIMITED_BYTES
        return min(HEAD_WORKSPACE[kind], self._lane_rows(rows) * BLOCK_TOKENS * self.config.vocab_size * each)

    def _workspace(self, stage: Stage, rows: int) -> int:
        """Return the bytes of the temporaries of the stage's largest forward, which reads pieces of prompts and the
        finished blocks of a lane together."""
        config, size, blocks = self.config, self.dtype.itemsize, self._blocks(rows)
        prompts, kind = self.limits.max_prefill_tokens, stage.device.type
        queries = max(BLOCK_TOKENS, min(causal_queries(kind), prompts))
        forward = Forward(tokens=prompts + blocks.tokens, rows=min(rows, prompts), queries=queries)
        layers = max(stage.context, stage.denoiser, key=len)
        if kind == "cuda":
            read = Forward(tokens=prompts, rows=min(rows, -(-prompts // BLOCK_TOKENS)), queries=queries)
            return cuda_forward_bytes(config, size, layers, forward, read)
        return plain_forward_bytes(config, size, layers, forward, self.context)

    def _graphs(self, stage: Stage, rows: int) -> int:
        """Return the bytes that the stage's CUDA graphs keep; 0 on a CPU."""
        if stage.device.type != "cuda":
            return 0
        layers = max(stage.context, stage.denoiser, key=len)
        return graph_bytes(self.config, self.dtype.itemsize, layers, self._blocks(rows))

    def _blocks(self, rows: int) -> Forward:
        """Return the size of a forward over one block of each row of a lane."""
        count = self._lane_rows(rows)
        return Forward(tokens=count * BLOCK_TOKENS, rows=count, queries=BLOCK_TOKENS)

    def _fits(self, rows: int, kv_tokens: int) -> bool:
        """Return whether `rows` rows with `kv_tokens` tokens of context in total fit on all devices."""
        room = _room(self.devices(rows), rows)
        return room is None or room >= kv_tokens

    def _auto_rows(self) -> int:
        """Return how many rows fit, up to AUTO_MAX_ROWS, with a context of AUTO_CONTEXT_TOKENS each and room for one of
        the longest contexts, or within kv_tokens if that is given.

        Returns 1 if not even one row fits; `plan` then refuses. Raises RequestError if fewer rows fit than there are
        lanes.
        """
        cap = min(AUTO_MAX_ROWS[stage.device.type] for stage in self.stages)
        usual = _in_pages(min(self.context, AUTO_CONTEXT_TOKENS))
        given, least = self.limits.kv_tokens, _in_pages(self.context)
        if given is not None:
            cap = max(1, min(cap, given // usual))
            rows = _largest(cap, lambda rows: self._fits(rows, _in_pages(given)))
        else:
            rows = _largest(cap, lambda rows: self._fits(rows, max(least, rows * usual)))
        if rows and rows < (self.limits.lanes or 1):
            raise RequestError(
                f"engine.lanes is {self.limits.lanes}, but engine.max_rows auto comes to {rows}: lower lanes"
            )
        return max(1, rows)

    def _refusal(self, rows: int) -> str:
        """Return the error message for limits that do not fit: which device has too little memory, and which limits
        would fit."""
        given = self.limits.kv_tokens
        context = _in_pages(given or self.context)
        devices = self.devices(rows)
        tight = min(devices, key=lambda plan: plan.left(rows, context) - plan.kept_back)
        states = tight.states_per_row * (rows + PREFIX_SLOTS)
        fault = (
            f"{tight.device} has {size_text(tight.free)} free beside its weights and keeps "
            f"{size_text(tight.kept_back)} of it back; it needs {size_text(states)} for states, "
            f"{size_text(tight.working)} for forwards and {size_text(tight.kv_per_token * context)} for "
            f"{context:,} tokens of context"
        )
        most = _largest(rows - 1, lambda fewer: self._fits(fewer, context))
        if given is not None:
            what = f"the context of engine.max_rows {rows} and engine.kv_tokens {given}; lower them"
            room = _room(devices, rows) or 0
            return f"no memory for {what}: {fault}" + (f"; {room:,} tokens would fit" if room > 0 else "")
        if most:
            return f"no memory for engine.max_rows {rows}; lower it to {most} at most, or use more devices: {fault}"
        return (
            f"no memory for one row of {self.context:,} tokens; lower engine.max_context_tokens or "
            f"engine.max_prefill_tokens, or use more devices: {fault}"
        )


def _room(devices: Sequence[DevicePlan], rows: int) -> int | None:
    """Return how many tokens of context fit on every device beside `rows` rows: -1 if the rows alone do not fit, None
    if context takes no memory anywhere."""
    rooms = [room for plan in devices if (room := plan.kv_room(rows)) is not None]
    return min(rooms, default=None)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `most` for which `fits` is true, or 0 if there is none. If it is true for a
    number, it must be true for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _in_pages(tokens: int) -> int:
    """Return the number of tokens rounded up to whole pages."""
    return pages_for(tokens) * PAGE_SIZE


def _name(device: torch.device) -> str:
    """Return the name of a device in the plan; `cuda` without a number is `cuda:0`."""
    return "cuda:0" if str(device) == "cuda" else str(device)
