"""Plain torch kernels: any device, the definition of what the others must compute.

On a CPU in float32 a row's result is the same bit for bit in whatever company it is computed. As measured with torch
2.13 and MKL, a matrix product sums in another order for 1 to 3 rows, and by a row's position where it has fewer than
12 outputs and inputs that are no multiple of 4: `linear` pads them away. Attention runs row by row, for 4 queries at
least: with fewer the order of its sums depends on the number of threads. The rest works element by element, with
operations that treat every element alike (model.layers.activations).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import ScanWeights
from model.layers.activations import silu, softplus
from model.rows import Rows

MIN_GEMM_ROWS = 16
MIN_GEMM_OUTPUTS = 12
MIN_QUERIES = 4
SCAN_CHUNK = 16  # tokens: the block size of the released model, so that a block is one chunk


class PlainKernels:
    """See `model.kernels.Kernels`."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        (rows, size_in), size_out = x.shape, weight.shape[0]
        more_rows = max(0, MIN_GEMM_ROWS - rows)
        more_in, more_out = -size_in % 4, max(0, MIN_GEMM_OUTPUTS - size_out)
        if more_out and (more_in or size_out == 1):  # never so in a released model
            weight = F.pad(weight, (0, more_in, 0, more_out))
            return F.linear(F.pad(x, (0, more_in, 0, more_rows)), weight)[:rows, :size_out]
        return F.linear(F.pad(x, (0, 0, 0, more_rows)), weight)[:rows] if more_rows else F.linear(x, weight)

    def mamba_scan(
        self,
        xbc: Tensor,
        dt: Tensor,
        weights: ScanWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        rows: Rows,
        *,
        store: bool,
    ) -> Tensor:
        index = rows.on(xbc.device)
        xbc = rows.padded(xbc)  # (R, L, conv_dim)
        history = conv_states[index.slots]  # (R, conv_dim, conv_kernel)
        mixed, history = _causal_conv(xbc, history, weights.conv_weight, weights.conv_bias, index.lengths)

        heads, head_dim, state = ssm_states.shape[1:]
        x, B, C = mixed.split([heads * head_dim, weights.groups * state, weights.groups * state], dim=-1)
        dt = softplus(rows.padded(dt).float() + weights.dt_bias).clamp(*weights.dt_limit)
        inside = torch.arange(dt.shape[1], device=dt.device) < index.lengths[:, None]
        dt = dt * inside[..., None]  # at padding the state passes through
        y, states = selective_scan(
            x.unflatten(-1, (heads, head_dim)),
            dt,
            weights.decay,
            B.unflatten(-1, (weights.groups, state)),
            C.unflatten(-1, (weights.groups, state)),
            ssm_states[index.slots],
        )
        y = y + weights.D[:, None] * x.unflatten(-1, (heads, head_dim))
        if store:
            conv_states[index.slots] = history
            ssm_states[index.slots] = states
        return rows.flat(y.flatten(-2))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, rows: Rows, *, causal: bool, store: bool
    ) -> Tensor:
        out = torch.empty_like(q)
        page_size = pages.shape[2]
        for start, length, context, row_pages in zip(rows.starts, rows.lengths, rows.context, rows.pages, strict=True):
            mine = slice(start, start + length)
            if store:
                position = torch.arange(context, context + length, device=q.device)
                table = torch.tensor(row_pages, dtype=torch.int64, device=q.device)
                where = (table[position // page_size], position % page_size)
                pages[0][where] = k[mine]
                pages[1][where] = v[mine]
            past = _gather(pages, row_pages[: -(-context // page_size)])[:, :context]  # (2, context, kv heads, D)
            keys, values = torch.cat([past[0], k[mine]]), torch.cat([past[1], v[mine]])
            out[mine] = _attend_row(q[mine], keys, values, causal=causal)
        return out.flatten(-2)

    def experts(self, x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        per_token = choice.shape[1]
        order = choice.flatten().argsort(stable=True)  # (N * K): token-and-choice pairs, expert by expert
        counts = torch.bincount(choice.flatten(), minlength=up.shape[0]).tolist()
        outputs = []
        for expert, chosen in enumerate(order.split(counts)):
            if len(chosen):
                hidden = F.relu(self.linear(x[chosen // per_token], up[expert])).square()
                outputs.append(self.linear(hidden, down[expert]))
        sorted_out = torch.cat(outputs)
        out = torch.empty_like(sorted_out)
        out[order] = sorted_out
        summed: Tensor = (out.unflatten(0, (-1, per_token)) * weight[..., None].to(x.dtype)).sum(dim=1)
        return summed


def _causal_conv(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU, seeded.

    x (R, L, C), history (R, C, W) the last raw inputs, oldest first -> ((R, L, C) float32, the new history).
    """
    width = weight.shape[-1]
    line = torch.cat([history.transpose(1, 2), x], dim=1)  # (R, W + L, C)
    length = x.shape[1]
    out = bias.float()
    for tap in range(width):  # the last tap multiplies the current token
        out = out + line[:, tap + 1 : tap + 1 + length].float() * weight[:, tap].float()
    newest = lengths[:, None] + torch.arange(width, device=x.device)  # (R, W) positions in `line`
    history = line.gather(1, newest[..., None].expand(-1, -1, x.shape[2])).transpose(1, 2)
    return silu(out), history


def selective_scan(
    x: Tensor,  # (R, L, heads, head_dim) float32
    dt: Tensor,  # (R, L, heads) float32, 0 where the state must pass
    decay: Tensor,  # (heads,) A, negative
    B: Tensor,  # (R, L, groups, state)
    C: Tensor,  # (R, L, groups, state)
    states: Tensor,  # (R, heads, head_dim, state) float32
) -> tuple[Tensor, Tensor]:
    """s <- exp(dt A) s + dt x (outer) B; y = s C, chunk by chunk -> (y (R, L, heads, head_dim), the last states).

    Inside a chunk the recurrence is unrolled into products of C, B and decays (Mamba-2, arXiv 2405.21060, section 6).
    Every exponent is a sum of dt A <= 0, so nothing overflows however large the seeded state is.
    """
    length, heads = x.shape[1], x.shape[2]
    short = -length % SCAN_CHUNK
    x, dt, B, C = (F.pad(z, (0, 0) * (z.dim() - 2) + (0, short)) for z in (x, dt, B, C))
    repeat = heads // B.shape[2]
    lower = torch.ones(SCAN_CHUNK, SCAN_CHUNK, dtype=torch.bool, device=x.device).tril()
    outputs = []
    for begin in range(0, x.shape[1], SCAN_CHUNK):
        chunk = slice(begin, begin + SCAN_CHUNK)
        xq = x[:, chunk].transpose(1, 2)  # (R, heads, Q, head_dim)
        dtq = dt[:, chunk].transpose(1, 2)  # (R, heads, Q)
        Bq = B[:, chunk].transpose(1, 2).repeat_interleave(repeat, dim=1)  # (R, heads, Q, state)
        Cq = C[:, chunk].transpose(1, 2).repeat_interleave(repeat, dim=1)
        log_decay = (dtq * decay[:, None]).cumsum(-1)  # (R, heads, Q)
        # the decay from position j to i as a sum of its own: a difference of two long sums loses digits where a large
        # dt stands before both
        steps = (dtq * decay[:, None])[..., :, None].expand(*dtq.shape, SCAN_CHUNK).masked_fill(~lower.tril(-1), 0)
        between = steps.cumsum(-2).masked_fill(~lower, -torch.inf).exp()  # (R, heads, Q, Q)
        mix = (Cq @ Bq.transpose(-1, -2)) * between * dtq[..., None, :]  # (R, heads, Q, Q)
        seeded = (Cq @ states.transpose(-1, -2)) * log_decay.exp()[..., None]
        outputs.append((mix @ xq + seeded).transpose(1, 2))
        to_end = between[..., -1, :] * dtq  # (R, heads, Q)
        states = log_decay[..., -1:, None].exp() * states + (xq * to_end[..., None]).transpose(-1, -2) @ Bq
    return torch.cat(outputs, dim=1)[:, :length], states


def _gather(pages: Tensor, used: tuple[int, ...]) -> Tensor:
    """pages (2, pages, page_size, …) -> (2, tokens, …) of the used ones, in their order; a view where they adjoin."""
    first, count = (used[0], len(used)) if used else (0, 0)
    if used == tuple(range(first, first + count)):
        return pages[:, first : first + count].flatten(1, 2)
    return pages[:, torch.tensor(used, device=pages.device)].flatten(1, 2)


def _attend_row(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """q (L, query heads, D) over k, v (T, kv heads, D), the last L of T the row's own -> (L, query heads, D)."""
    length, total = q.shape[0], k.shape[0]
    more = max(0, MIN_QUERIES - length)
    if more:
        q = torch.cat([q, q[-1:].expand(more, -1, -1)])
    mask = None
    whole = causal and total == length and not more  # the case that torch knows by itself
    if causal and length > 1 and not whole:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
        mask = torch.cat([mask, mask[-1:].expand(more, -1)])
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=whole,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)[:length]
