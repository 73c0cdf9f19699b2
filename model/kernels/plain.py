"""Plain torch kernels: any device, the definition of what the others must compute.

On a CPU in float32 a row's result is the same bit for bit in whatever company it is computed: matrix products never
run below `MIN_GEMM_ROWS` rows (MKL sums in another order for 1 to 3 rows: measured with torch 2.13, from 4 rows on
the result of a row is independent of their number), attention runs row by row, and the rest works element by element
with operations that treat every element alike (model.layers.activations).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import ScanWeights
from model.layers.activations import silu, softplus
from model.rows import Rows

MIN_GEMM_ROWS = 16
SCAN_CHUNK = 16  # tokens: the block size of the released model, so that a block is one chunk


class PlainKernels:
    """See `model.kernels.Kernels`."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows >= MIN_GEMM_ROWS:
            return F.linear(x, weight)
        return F.linear(F.pad(x, (0, 0, 0, MIN_GEMM_ROWS - rows)), weight)[:rows]

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
            table = torch.tensor(row_pages, dtype=torch.int64, device=q.device)
            if store:
                position = torch.arange(context, context + length, device=q.device)
                where = (table[position // page_size], position % page_size)
                pages[0][where] = k[mine]
                pages[1][where] = v[mine]
            used = table[: -(-context // page_size)]
            past = pages[:, used].flatten(1, 2)[:, :context]  # (2, context, kv heads, head_dim)
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
        between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~lower, -torch.inf).exp()
        mix = (Cq @ Bq.transpose(-1, -2)) * between * dtq[..., None, :]  # (R, heads, Q, Q)
        seeded = (Cq @ states.transpose(-1, -2)) * log_decay.exp()[..., None]
        outputs.append((mix @ xq + seeded).transpose(1, 2))
        to_end = (log_decay[..., -1:] - log_decay).exp() * dtq  # (R, heads, Q)
        states = log_decay[..., -1:, None].exp() * states + (xq * to_end[..., None]).transpose(-1, -2) @ Bq
    return torch.cat(outputs, dim=1)[:, :length], states


def _attend_row(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """q (L, query heads, D) over k, v (T, kv heads, D), the last L of T the row's own -> (L, query heads, D)."""
    length, total = q.shape[0], k.shape[0]
    mask = None
    if causal and length > 1 and total > length:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal and length > 1 and total == length,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
