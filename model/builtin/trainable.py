"""Computes both towers as differentiable functions of their weights, over whole documents at once, for training.

A row holds several documents in chunks of CHUNK tokens, which is also the block size. A document begins at the start of
a chunk. Its prompt is padded in front so that its completion also begins at the start of a chunk; each block of a
completion is one chunk. Padding does not change the Mamba state, is zero for the convolution, and is not attended to by
other tokens. So a document gets the same results as in the engine, which computes it alone and without padding.

Weights are a dict with the checkpoint's names without the tower's prefix; the experts of a layer are stacked.
Shapes: B rows, N chunks per row, Q = CHUNK tokens, T = N * Q, H hidden, K blocks of a row; Mamba: M heads of D
channels, G groups, S states, C conv channels, W conv taps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint.config import TwoTowerConfig
from model.network.layers.time import sinusoids

CHUNK = 16
Weights = Mapping[str, Tensor]
Seeds = tuple[Tensor, Tensor]
"""The data of one context layer that the denoiser needs. Mamba: the SSM state (B, N, M, D, S) and the last raw conv
inputs (B, N, W - 1, C) before each chunk. Attention: K and V (B, T, kv heads, head_dim). MoE: two empty tensors."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of each document in its row."""

    document: Tensor
    """(B, N): the number, within its row, of the document that a chunk belongs to. Unused chunks have a number of their
    own."""
    real: Tensor
    """(B, T) bool: False at padding."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of each row that are denoised in one step, all at the same time and independently of each other."""

    chunk: Tensor
    """(B, K): the index of each block's chunk in the row."""
    t: Tensor
    """(B, K): the masked fraction of each block."""


def context(
    config: TwoTowerConfig, weights: Weights, ids: Tensor, layout: Layout, loads: list[Tensor]
) -> tuple[Tensor, list[Seeds]]:
    """Run the context tower: ids (B, T) -> hidden (B, T, H) after the final norm, and the Seeds of each layer.

    Appends to `loads`, for each MoE layer in order, the share of tokens that chose each expert (E,).
    """
    x = weights["embeddings.weight"][ids]
    seeds: list[Seeds] = []
    for i, kind in enumerate(config.layer_kinds):
        w = _Layer(weights, i)
        normed = _norm(config, x, w["norm.weight"])
        if kind == "mamba":
            mixed, seed = _context_mamba(config, w, normed, layout)
        elif kind == "attention":
            mixed, seed = _context_attention(config, w, normed, layout)
        else:
            mixed, seed = _moe(config, w, normed, loads), (x.new_empty(0), x.new_empty(0))
        x = x + mixed
        seeds.append(seed)
    return _norm(config, x, weights["norm_f.weight"]), seeds


def denoiser(
    config: TwoTowerConfig,
    weights: Weights,
    ids: Tensor,
    blocks: Blocks,
    seeds: list[Seeds],
    layout: Layout,
    loads: list[Tensor],
) -> Tensor:
    """Run the denoiser tower: ids (B, K, Q), some of them masks -> hidden (B, K, Q, H) after the final norm.

    Each block sees only itself and the context before it. loads: see `context`.
    """
    time = _time(config, weights, blocks.t)  # (B, K, 3, H)
    visible = _visible(blocks, layout)
    x = weights["embeddings.weight"][ids]
    for i, kind in enumerate(config.layer_kinds):
        w = _Layer(weights, i)
        shift, scale, gate = (time + weights[f"scale_shift_tables.{i}"])[..., None, :].unbind(2)  # (B, K, 1, H)
        norm = w["norm.weight"]
        if kind == "moe":
            mixed = _moe(config, w, _norm(config, x, norm) * (1 + scale) + shift, loads)
        elif kind == "mamba":
            normed = _norm(config, x * (1 + scale) + shift, norm)
            mixed = _scan(config, w, normed, *(_pick(seed, blocks.chunk) for seed in seeds[i]))
        else:
            normed = _norm(config, x * (1 + scale) + shift, norm)
            mixed = _block_attention(config, w, normed, *seeds[i], visible)
        x = x + gate * mixed
    return _norm(config, x, weights["norm_f.weight"])


class _Layer:
    """The weights of one layer, by their names without the layer's prefix."""

    def __init__(self, weights: Weights, index: int) -> None:
        self.weights, self.prefix = weights, f"layers.{index}."

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]


def _norm(config: TwoTowerConfig, x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.layer_norm_epsilon) * weight


def _time(config: TwoTowerConfig, weights: Weights, t: Tensor) -> Tensor:
    x = sinusoids(t.flatten(), torch.float32)
    x = F.silu(F.linear(x, weights["t_embedder.mlp.0.weight"], weights["t_embedder.mlp.0.bias"]))
    x = F.silu(F.linear(x, weights["t_embedder.mlp.2.weight"], weights["t_embedder.mlp.2.bias"]))
    x = F.linear(x, weights["t_block.1.weight"], weights["t_block.1.bias"])
    return x.float().view(*t.shape, 3, config.hidden_size)


def _pick(seed: Tensor, chunk: Tensor) -> Tensor:
    """Return the seeds before the given chunks: seed (B, N, …), chunk (B, K) -> (B, K, …)."""
    return seed[torch.arange(len(chunk), device=chunk.device)[:, None], chunk]


# Mamba. Everything except the two projections runs in float32.


def _context_mamba(config: TwoTowerConfig, w: _Layer, x: Tensor, layout: Layout) -> tuple[Tensor, Seeds]:
    """Run a Mamba layer over x (B, T, H), each document from an empty state -> (B, T, H), and the layer's seeds."""
    z, xbc, dt = _project(config, w, x)
    xbc = xbc * layout.real[..., None]
    first = F.pad(layout.document[:, 1:] != layout.document[:, :-1], (1, 0), value=True)  # (B, N): a document begins
    chunks = xbc.unflatten(1, (-1, CHUNK))  # (B, N, Q, C)
    tails = F.pad(chunks[:, :-1, 1 - config.conv_kernel :], (0, 0, 0, 0, 1, 0)) * ~first[..., None, None]
    inputs, B, C, dt = _inputs(config, w, chunks, tails, (dt * 1.0).unflatten(1, (-1, CHUNK)))
    dt = dt * layout.real.unflatten(1, (-1, CHUNK))[..., None]
    decay = dt * -w["mixer.A_log"].exp()  # (B, N, Q, M), logarithms
    total = decay.sum(2)  # (B, N, M)
    to_end = (total[:, :, None] - decay.cumsum(2)).exp()
    heads = config.mamba_num_heads // config.n_groups
    added = torch.einsum(
        "bnqmd,bnqms->bnmds", inputs * (dt * to_end)[..., None], B.repeat_interleave(heads, dim=3)
    )  # the part that each chunk adds to the state
    # The state before chunk n is the sum of these parts over earlier chunks j of its document, each decayed by the
    # chunks between j and n.
    until = total.cumsum(1)
    between = (until - total)[:, :, None] - until[:, None]  # (B, n, j, M)
    chunk = torch.arange(total.shape[1], device=x.device)
    earlier = (chunk[:, None] > chunk) & (layout.document[:, :, None] == layout.document[:, None])  # (B, n, j)
    passed = between.masked_fill(~earlier[..., None], -torch.inf).exp()
    states = torch.einsum("bnjm,bjmds->bnmds", passed, added)
    y = _mix(config, w, inputs, B, C, dt, decay, states)
    return _finish(config, w, y.flatten(1, 2), z), (states, tails)


def _scan(config: TwoTowerConfig, w: _Layer, x: Tensor, states: Tensor, tails: Tensor) -> Tensor:
    """Run a Mamba layer over x (B, K, Q, H), each block separately from its seed (states, tails) -> (B, K, Q, H)."""
    z, xbc, dt = _project(config, w, x)
    inputs, B, C, dt = _inputs(config, w, xbc, tails, dt)
    y = _mix(config, w, inputs, B, C, dt, dt * -w["mixer.A_log"].exp(), states)
    return _finish(config, w, y, z)


def _project(config: TwoTowerConfig, w: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = F.linear(x, w["mixer.in_proj.weight"])
    z, xbc, dt = projected.split([config.mamba_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
    return z.float(), xbc.float(), dt.float()


def _inputs(
    config: TwoTowerConfig, w: _Layer, xbc: Tensor, tails: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the inputs of the scan from xbc (B, N, Q, C) and the conv inputs before it, tails (B, N, W - 1, C).

    Returns x (…, M, D), B and C (…, G, S), and dt (…, M).
    """
    line = torch.cat([tails, xbc], dim=2)
    taps, out = w["mixer.conv1d.weight"][:, 0], w["mixer.conv1d.bias"]
    for tap in range(config.conv_kernel):
        out = out + line[:, :, tap : tap + CHUNK] * taps[:, tap]
    size = config.n_groups * config.ssm_state_size
    x, B, C = F.silu(out).split([config.mamba_inner, size, size], dim=-1)
    shape = (config.n_groups, config.ssm_state_size)
    dt = F.softplus(dt + w["mixer.dt_bias"])
    return x.unflatten(-1, (-1, config.mamba_head_dim)), B.unflatten(-1, shape), C.unflatten(-1, shape), dt


def _mix(
    config: TwoTowerConfig,
    w: _Layer,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    decay: Tensor,
    states: Tensor,
) -> Tensor:
    """Scan each chunk from the state before it (Mamba-2, arXiv 2405.21060, section 6) -> y (B, N, Q, M, D)."""
    heads = config.mamba_num_heads // config.n_groups
    since = decay.cumsum(2)  # (B, N, Q, M)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()[..., None]
    passed = (since[:, :, :, None] - since[:, :, None]).masked_fill(~later, -torch.inf).exp()  # (B, N, i, j, M)
    product = torch.einsum("bnigs,bnjgs->bnijg", C, B).repeat_interleave(heads, dim=-1)
    y = torch.einsum("bnijm,bnjmd->bnimd", product * passed, x * dt[..., None])
    seeded = torch.einsum("bnigs,bngmds->bnigmd", C, states.unflatten(2, (config.n_groups, heads))).flatten(3, 4)
    return y + seeded * since.exp()[..., None] + x * w["mixer.D"][:, None]


def _finish(config: TwoTowerConfig, w: _Layer, y: Tensor, z: Tensor) -> Tensor:
    gated = (y.flatten(-2) * F.silu(z)).unflatten(-1, (config.n_groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + config.layer_norm_epsilon)
    return F.linear(normed.flatten(-2) * w["mixer.norm.weight"], w["mixer.out_proj.weight"])


# Attention


def _context_attention(config: TwoTowerConfig, w: _Layer, x: Tensor, layout: Layout) -> tuple[Tensor, Seeds]:
    q, k, v = _qkv(config, w, x)
    document = layout.document.repeat_interleave(CHUNK, dim=1)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    mask = (document[:, :, None] == document[:, None]) & causal & layout.real[:, None]
    # padding sees itself, because a query without any key would give NaN
    mask = mask | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return _attend(w, q, k, v, mask), (k, v)


def _visible(blocks: Blocks, layout: Layout) -> Tensor:
    """Return the attention mask (B, K * Q, T + K * Q) bool of blocks: the context's keys first, then the blocks' own.

    A token sees its document before the chunk of its block, and its block.
    """
    chunk, token = torch.arange(layout.document.shape[1], device=blocks.t.device), CHUNK
    own = layout.document.gather(1, blocks.chunk)
    before = (layout.document[:, None] == own[..., None]) & (chunk < blocks.chunk[..., None])  # (B, K, N)
    before = before.repeat_interleave(token, dim=2) & layout.real[:, None]
    same = torch.eye(blocks.chunk.shape[1], dtype=torch.bool, device=blocks.t.device).repeat_interleave(token, dim=1)
    together = torch.cat([before, same.expand(len(before), -1, -1)], dim=2)  # (B, K, T + K * Q)
    return together.repeat_interleave(token, dim=1)


def _block_attention(config: TwoTowerConfig, w: _Layer, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    q, own_k, own_v = _qkv(config, w, x.flatten(1, 2))
    k, v = torch.cat([k.to(own_k.dtype), own_k], dim=1), torch.cat([v.to(own_v.dtype), own_v], dim=1)
    attended: Tensor = _attend(w, q, k, v, visible).unflatten(1, (-1, CHUNK))
    return attended


def _qkv(config: TwoTowerConfig, w: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = (F.linear(x, w[f"mixer.{name}_proj.weight"]) for name in "qkv")
    q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in projected)
    return q, k, v


def _attend(w: _Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention with its output projection: (B, L, H).

    q (B, L, heads, d), k, v (B, T, kv heads, d), mask (B, L, T): True where a query sees a key.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return F.linear(out.transpose(1, 2).flatten(2), w["mixer.o_proj.weight"])


# Experts


def _moe(config: TwoTowerConfig, w: _Layer, x: Tensor, loads: list[Tensor]) -> Tensor:
    """Return the output of an MoE layer for x (…, H), and append the share of tokens per expert (E,) to `loads`.

    All experts run on all tokens, with weight 0 for experts that were not chosen. For experts this small, this is
    faster than sorting the tokens.
    """
    weight = route(config, w["mixer.gate.weight"], w["mixer.gate.e_score_correction_bias"], x)
    loads.append((weight.detach() > 0).float().flatten(0, -2).mean(0))
    up, down = w["mixer.experts.up"], w["mixer.experts.down"]  # (E, width, H), (E, H, width)
    hidden = F.relu(F.linear(x, up.flatten(0, 1))).square().unflatten(-1, (up.shape[0], -1)) * weight[..., None]
    routed = F.linear(hidden.flatten(-2), down.transpose(0, 1).flatten(1))
    shared = F.relu(F.linear(x, w["mixer.shared_experts.up_proj.weight"])).square()
    return routed + F.linear(shared, w["mixer.shared_experts.down_proj.weight"])


def route(config: TwoTowerConfig, gate: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Return the router's weight of each expert, 0 if it was not chosen: x (…, H), gate (E, H), bias (E,) -> (…, E)."""
    with torch.autocast(x.device.type, enabled=False):
        scores = torch.sigmoid(F.linear(x.float(), gate.float()))
    chosen = torch.zeros_like(scores).scatter(
        -1, (scores.detach() + bias).topk(config.num_experts_per_tok).indices, 1.0
    )
    weight = scores * chosen
    return weight / (weight.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
