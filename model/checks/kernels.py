"""Checks the kernels of a loaded model against their definitions in float64, on the model's own devices.

A wrong kernel raises no error: the text is wrong, or every block takes all its steps. So a replica runs this check
before it takes work, for each device and tower, with the checkpoint's own sizes and the weights of the first layer of
each kind. The cases are those in which kernels are known to fail: rows shorter than the convolution, seeded rows
shorter than a chunk, seeds far larger than the inputs, rows of different lengths, and slots and pages that still hold
data of earlier rows.

The work does not depend on the model's depth. The definitions run on the CPU, the scan on about 230 tokens for each
tower and device.

A tolerance limits max|difference| / max|right| of a row. The tolerances come from the errors of the plain kernels and
from faults that were built into them, at the sizes of builtin:noise and of the released model. The scan gives float32
whatever the model's dtype, and gets the same inputs as its definition. SCAN_TOLERANCE is about 30 times the error of
the plain scan, and a 13th of the mildest fault, products in TensorFloat-32; anything rounded to bfloat16 on the way is
worse. Attention, experts and products give the model's dtype. In bfloat16 they are off by 0.5 eps, and experts by 1.5
eps, because a rounded value is squared. The mildest fault among wrong heads, masks, scales and experts is 2.6 times
OUTPUT_TOLERANCE in bfloat16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint.config import TwoTowerConfig
from model.checks import definition
from model.checks.definition import relative_error
from model.errors import TwoTowerError
from model.kernels.protocol import Kernels, ScanInputs
from model.network.layers.attention import Attention
from model.network.layers.mamba2 import Mamba2
from model.network.layers.moe import MoE
from model.network.two_tower import TwoTower
from model.runtime.page_allocator import PAGE_SIZE
from model.runtime.ragged_batch import RaggedBatch

SCAN_TOLERANCE = 2e-5  # of the scan's outputs and states, in any dtype
OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8 * 2.0**-7}
LARGE = 1000.0
"""The standard deviation of the SSM states that rows start from. That of the inputs is 1."""
SEED = 20260626


class KernelError(TwoTowerError):
    """A kernel of the loaded model computes wrong results on its device."""


@dataclass(frozen=True, slots=True)
class _Where:
    """The settings that all cases of one layer share: its kernels, tower, device and dtype, and the random numbers."""

    kernels: Kernels
    tower: str
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers with standard deviation `size`, which are the same on every device."""
        return (torch.randn(*shape, generator=self.generator) * size).to(self.device, dtype or self.dtype)

    def close(self, kernel: str, what: str, error: float, allowed: float) -> None:
        """Raise KernelError if `error` (see relative_error) is larger than allowed. `what` names the results."""
        if not error <= allowed:
            off = f"off by {error:.2g} of the largest, {allowed:.2g} is allowed" if error < torch.inf else "not finite"
            raise self._wrong(kernel, f"{what} are {off}")

    def exact(self, kernel: str, what: str, right: bool) -> None:
        """Raise KernelError if `right` is False. `what` names the data that must be equal bit for bit."""
        if not right:
            raise self._wrong(kernel, f"{what} are not what they must be, bit for bit")

    def _wrong(self, kernel: str, fault: str) -> KernelError:
        return KernelError(
            f"kernel {kernel} of {type(self.kernels).__name__} is wrong on {self.device} in "
            f"{str(self.dtype).removeprefix('torch.')} ({self.tower} tower): {fault}; nothing was generated: compare "
            "the GPU, driver, torch and Triton of this node with one that starts, or set workers.gpus: 0"
        )


def check_kernels(pair: TwoTower) -> None:
    """Check the kernels of every kind of layer on every device of each tower.

    Raises KernelError, with kernel, case, device, dtype and error, if one of them is wrong.
    """
    towers = {"context": pair.context} | ({"denoiser": pair.denoiser} if pair.denoiser is not None else {})
    for name, tower in towers.items():
        seen = set[tuple[torch.device, type]]()
        for device, layer in zip(tower.devices, tower.layers, strict=True):
            mixer = layer.mixer
            if (device, type(mixer)) in seen:
                continue
            seen.add((device, type(mixer)))
            assert isinstance(mixer, Mamba2 | Attention | MoE)
            generator = torch.Generator().manual_seed(SEED)
            where = _Where(mixer.kernels, name, device, pair.dtype, generator)
            with torch.inference_mode():
                if isinstance(mixer, Mamba2):
                    check_scan(where, mixer, pair.config)
                elif isinstance(mixer, Attention):
                    check_attention(where, pair.config)
                    check_linear(where, mixer.k_proj.weight)
                else:
                    check_experts(where, mixer)


@dataclass(frozen=True, slots=True)
class _Scan:
    """A forward through mamba_scan: row r has slot r, and a seed is a slot or -1. One more slot is that of a prefix."""

    name: str
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    store: bool


def _scans(config: TwoTowerConfig) -> Iterator[_Scan]:
    """Yield the cases of `check_scan`, in which kernels are known to fail."""
    taps, chunk = config.conv_kernel, config.chunk_size
    yield _Scan("rows that begin", (1, taps - 1, 16, 2 * taps + 17), (-1,) * 4, store=True)
    yield _Scan(f"seeded blocks shorter than chunk_size {chunk}", (16,) * 3, (0, 3, 3), store=False)
    yield _Scan("seeded rows of unlike lengths", (1, 2, chunk + 5, taps), (4, -1, 2, 3), store=True)


def check_scan(where: _Where, weights: Mamba2, config: TwoTowerConfig) -> None:
    """Check mamba_scan in all its cases: the outputs, the states that it stores, and that it changes no other state.

    Raises KernelError.
    """
    shape = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    for scan in _scans(config):
        count, tokens = len(scan.lengths), sum(scan.lengths)
        conv = where.normal(count + 1, config.conv_dim, config.conv_kernel)
        ssm = where.normal(count + 1, *shape, size=LARGE, dtype=torch.float32)
        for slot in set(range(count)) - set(scan.seeds):  # as earlier rows may have left them
            conv[slot], ssm[slot] = torch.nan, torch.nan
        xbc, dt = where.normal(tokens, config.conv_dim), where.normal(tokens, config.mamba_num_heads)
        rows = _rows(scan.lengths, scan.seeds, (0,) * count, ((),) * count)
        inputs = ScanInputs(xbc, dt, weights, conv, ssm, rows, scan.store)
        right, windows, states = definition.mamba_scan(inputs)
        expected = conv.clone(), ssm.clone()
        got = where.kernels.mamba_scan(inputs)
        error = relative_error(got, right, scan.lengths)
        where.close("mamba_scan", f"outputs of {scan.name}", error, SCAN_TOLERANCE)
        if scan.store:
            error = relative_error(ssm[:count], states, (1,) * count)
            where.close("mamba_scan", f"states stored by {scan.name}", error, SCAN_TOLERANCE)
            expected[0][:count], expected[1][:count] = windows, ssm[:count]
        same = torch.equal(conv.nan_to_num(), expected[0].nan_to_num())
        where.exact("mamba_scan", f"convolution inputs in the slots after {scan.name}", same)
        same = torch.equal(ssm.nan_to_num(), expected[1].nan_to_num())
        where.exact("mamba_scan", f"states that are not to be written, after {scan.name},", same)


def check_attention(where: _Where, config: TwoTowerConfig) -> None:
    """Check attention over paged contexts, for prompts and for blocks: its outputs, and the pages after it.

    Prompts are causal and stored; in a block every token sees all others, and nothing is stored. Raises KernelError.
    """
    for name, lengths, context, causal in (
        ("prompts", (1, PAGE_SIZE + 6, 16), (PAGE_SIZE, 0, 30), True),
        ("blocks", (16, 16, 5), (0, PAGE_SIZE + 36, 30), False),
    ):
        rows, pages = _paged(where, config, lengths, context)
        q = where.normal(sum(lengths), config.num_attention_heads, config.head_dim)
        own = where.normal(2, sum(lengths), config.num_key_value_heads, config.head_dim)
        expected, right = pages.clone(), []
        for row, (mine, kv) in enumerate(zip(q.split(list(lengths)), own.split(list(lengths), dim=1), strict=True)):
            table = list(rows.pages[row])
            keys = torch.cat([pages[:, table].flatten(1, 2)[:, : context[row]], kv], dim=1)
            right.append(definition.attend(mine, keys[0], keys[1], causal=causal))
            if causal:
                filled = expected[:, table].flatten(1, 2)
                filled[:, : keys.shape[1]] = keys
                expected[:, table] = filled.unflatten(1, (-1, PAGE_SIZE))
        got = where.kernels.attend(q, own[0], own[1], pages, rows, causal=causal, store=causal)
        error = relative_error(got, torch.cat(right), lengths)
        where.close("attend", f"outputs of {name}", error, OUTPUT_TOLERANCE[where.dtype])
        same = torch.equal(pages.nan_to_num(), expected.nan_to_num())
        where.exact("attend", f"keys and values in the pages after {name}", same)


def _paged(
    where: _Where, config: TwoTowerConfig, lengths: tuple[int, ...], context: tuple[int, ...]
) -> tuple[RaggedBatch, Tensor]:
    """Return rows whose pages are out of order, and the pages: random context, then NaN as left by earlier rows."""
    needed = [-(-(length + before) // PAGE_SIZE) for length, before in zip(lengths, context, strict=True)]
    tables = tuple(tuple(range(sum(needed[: r + 1]) - 1, sum(needed[:r]) - 1, -1)) for r in range(len(needed)))
    pages = where.normal(2, sum(needed), PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    for table, before in zip(tables, context, strict=True):
        held = pages[:, list(table)].flatten(1, 2)
        held[:, before:] = torch.nan
        pages[:, list(table)] = held.unflatten(1, (-1, PAGE_SIZE))
    return _rows(lengths, tuple(range(len(lengths))), context, tables), pages


def check_linear(where: _Where, weight: Tensor) -> None:
    """Check the product with `weight` (out, in), for one token and for several. Raises KernelError."""
    for tokens in (1, 17):
        x = where.normal(tokens, weight.shape[1])
        right = definition.wide(x) @ definition.wide(weight).T
        error = relative_error(where.kernels.linear(x, weight), right, (1,) * tokens)
        where.close("linear", f"outputs for token count {tokens}", error, OUTPUT_TOLERANCE[where.dtype])


def check_experts(where: _Where, mixer: MoE) -> None:
    """Check the experts' outputs for a few tokens with random choices and weights. Raises KernelError.

    The choices are among eight experts, more if a token needs more, or all if the layer has fewer. The first and the
    last expert are among the eight.
    """
    count, per_token, tokens = len(mixer.up), mixer.gate.per_token, 6
    chosen = torch.linspace(0, count - 1, min(count, max(8, per_token))).long()
    ranked = torch.rand(tokens, len(chosen), generator=where.generator)
    choice = chosen[ranked.topk(per_token).indices].to(where.device)
    weight = torch.rand(tokens, per_token, generator=where.generator).to(where.device)
    x = where.normal(tokens, mixer.up.shape[-1])
    got = where.kernels.experts(x, choice, weight, mixer.up, mixer.down)
    right = definition.experts(x, choice, weight, mixer.up, mixer.down)
    where.close("experts", "outputs", relative_error(got, right, (1,) * tokens), OUTPUT_TOLERANCE[where.dtype])


def _rows(
    lengths: tuple[int, ...], seeds: tuple[int, ...], context: tuple[int, ...], pages: tuple[tuple[int, ...], ...]
) -> RaggedBatch:
    return RaggedBatch(tuple(range(len(lengths))), seeds, lengths, context, pages)
