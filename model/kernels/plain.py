"""Implements the kernels in plain torch, for any device; they define the results that the other kernels must give.

On a CPU in float32, a row's result is the same bit for bit whatever other rows are computed with it, and a prompt's
result is the same whether the prompt enters the context at once or in pieces that are cut at whole pages. With torch
2.13 and MKL, a matrix product was seen to change its order of summation in three cases: for 1 to 3 rows; by a row's
position, if there are fewer than 12 outputs and the number of inputs is not a multiple of 4; and in float64 for the
rows after the last multiple of 4. `linear` avoids all three by padding. A batched product computes each of its matrices
separately. Attention runs in pieces of equal shapes (see model.kernels.plain_attention), and the scan in chunks that
are counted from the forward's first token. Everything else works element by element, with operations that treat all
elements alike (model.kernels.formulas).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import formulas, plain_sampling
from model.kernels.plain_attention import Pieces, place_tokens, plan_pieces
from model.kernels.protocol import HEAD_WORKSPACE, ScanInputs
from model.runtime.ragged_batch import RaggedBatch
from model.runtime.transfer import to_device

MIN_GEMM_ROWS = 16  # `linear` pads its input to at least so many rows
MIN_GEMM_OUTPUTS = 12  # with fewer, `linear` may have to pad inputs and outputs; see above
SCAN_CHUNK = 16  # tokens: the block size of the released model, so that a block is one chunk
SCAN_ELEMENTS = 2**22  # limit of the elements of the states between chunks that are in memory at once
VOCAB_SLICE = 8192  # columns; with 32,768 or more, torch splits the sum of a single row among its threads


def selective_scan(
    x: Tensor,  # (R, L, heads, head_dim) float32
    dt: Tensor,  # (R, L, heads) float32, 0 at tokens that must not change the state
    decay: Tensor,  # (heads,) A, negative
    B: Tensor,  # (R, L, groups, state)
    C: Tensor,  # (R, L, groups, state)
    states: Tensor,  # (R, heads, head_dim, state) float32
) -> tuple[Tensor, Tensor]:
    """Compute, token by token, s <- exp(dt A) s + dt x (outer) B and y = s C, with `states` as the first s.

    Returns y (R, L, heads, head_dim) and the last states; the arguments are not changed. Works chunk by chunk. Inside a
    chunk the recurrence is unrolled into products of C, B and decays (Mamba-2, arXiv 2405.21060, section 6).
    """
    length = x.shape[1]
    if short := -length % SCAN_CHUNK:
        x, dt, B, C = (F.pad(z, (0, 0) * (z.dim() - 2) + (0, short)) for z in (x, dt, B, C))
    x, dt, B, C = (z.unflatten(1, (-1, SCAN_CHUNK)).transpose(2, 3) for z in (x, dt, B, C))
    together = max(1, SCAN_ELEMENTS // states.numel())  # chunks
    outputs = []
    for begin in range(0, x.shape[1], together):
        some = slice(begin, begin + together)
        y, states = _scan_chunks(x[:, some], dt[:, some], decay, B[:, some], C[:, some], states)
        outputs.append(y)
    y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states


class PlainKernels:
    """The kernels in plain torch, for any device; `model.kernels.protocol.Kernels` describes the methods."""

    head_workspace = HEAD_WORKSPACE["cpu"]
    vocab_slice = VOCAB_SLICE
    rms_norm = staticmethod(formulas.rms_norm)
    gated_norm = staticmethod(formulas.gated_group_norm)
    uniforms = staticmethod(plain_sampling.uniforms)
    choose_tokens = staticmethod(plain_sampling.choose_tokens)
    recurrence = staticmethod(selective_scan)  # `_scan` calls it; a GPU may have a faster one

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        (rows, size_in), size_out = x.shape, weight.shape[0]
        more_rows = max(0, MIN_GEMM_ROWS - rows)
        if x.dtype == torch.float64:
            more_rows += -(rows + more_rows) % 4
        more_in, more_out = -size_in % 4, max(0, MIN_GEMM_OUTPUTS - size_out)
        if more_out and (more_in or size_out == 1):  # does not happen in a released model
            weight = F.pad(weight, (0, more_in, 0, more_out))
            return F.linear(F.pad(x, (0, more_in, 0, more_rows)), weight)[:rows, :size_out]
        return F.linear(F.pad(x, (0, 0, 0, more_rows)), weight)[:rows] if more_rows else F.linear(x, weight)

    def modulated_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        conditioning: Tensor,
        row_of_token: Tensor,
        *,
        norm_first: bool,
    ) -> Tensor:
        shift, scale = conditioning[:, :2].index_select(0, row_of_token).unbind(1)  # (N, H) each
        if norm_first:
            return formulas.modulate(formulas.rms_norm(x, weight, eps), shift, scale)
        return formulas.rms_norm(formulas.modulate(x, shift, scale), weight, eps)

    def gated_add(self, x: Tensor, mixed: Tensor, conditioning: Tensor, row_of_token: Tensor) -> Tensor:
        return x + conditioning[:, 2].index_select(0, row_of_token) * mixed

    def mamba_scan(self, inputs: ScanInputs) -> Tensor:
        rows, xbc, states = inputs.rows, inputs.xbc, inputs.ssm_states
        groups = rows.once((xbc.device, "scan"), lambda: rows.alike(xbc.device, SCAN_CHUNK))
        if len(groups) == 1:
            return self._scan(inputs)
        out = torch.empty(len(xbc), states.shape[1] * states.shape[2], device=xbc.device)
        for some, places in groups:  # so that short rows are not padded to the length of long ones
            x, dt = xbc.index_select(0, places), inputs.dt.index_select(0, places)
            out.index_copy_(0, places, self._scan(replace(inputs, xbc=x, dt=dt, rows=some)))
        return out

    def _scan(self, inputs: ScanInputs) -> Tensor:
        """Implement `mamba_scan` for rows of similar length: they are padded to the longest and scanned together."""
        rows, weights = inputs.rows, inputs.weights
        conv_states, ssm_states = inputs.conv_states, inputs.ssm_states
        index = rows.on(inputs.xbc.device)
        xbc = rows.padded(inputs.xbc)  # (R, L, conv_dim)
        seeds = index.seeds.clamp(min=0)
        history, states = conv_states.index_select(0, seeds), ssm_states.index_select(0, seeds)
        if min(rows.seeds) < 0:  # rows without a seed start from zeros, whatever is in the slot
            fresh = index.seeds < 0
            history.masked_fill_(fresh[:, None, None], 0)
            states.masked_fill_(fresh[:, None, None, None], 0)
        line = torch.cat([history.transpose(1, 2), xbc], dim=1)  # (R, conv_kernel + L, conv_dim) raw inputs
        mixed = _causal_conv(line, weights.conv_weight, weights.conv_bias)

        heads, head_dim, state = ssm_states.shape[1:]
        x, B, C = mixed.split([heads * head_dim, weights.groups * state, weights.groups * state], dim=-1)
        dt = formulas.softplus(rows.padded(inputs.dt).float() + weights.dt_bias).clamp(*weights.dt_limit)
        if rows.padding(xbc.device) is not None:  # padding must not change the state
            dt = dt * (torch.arange(dt.shape[1], device=dt.device) < index.lengths[:, None])[..., None]
        y, states = self.recurrence(
            x.unflatten(-1, (heads, head_dim)),
            dt,
            weights.decay,
            B.unflatten(-1, (weights.groups, state)),
            C.unflatten(-1, (weights.groups, state)),
            states,
        )
        y = torch.addcmul(y, x.unflatten(-1, (heads, head_dim)), weights.D[:, None])
        if inputs.store:
            newest = index.lengths[:, None] + torch.arange(history.shape[2], device=line.device)  # (R, conv_kernel)
            newest = newest[..., None].expand(-1, -1, line.shape[2])
            conv_states[index.slots] = line.gather(1, newest).transpose(1, 2)
            ssm_states[index.slots] = states
        return rows.flat(y.flatten(-2))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, rows: RaggedBatch, *, causal: bool, store: bool
    ) -> Tensor:
        page_size = pages.shape[2]
        kv = torch.stack([k, v])
        if store:
            index = rows.once((q.device, page_size), lambda: to_device(place_tokens(rows, page_size), q.device))
            pages.flatten(1, 2).index_copy_(1, index, kv)
        plan = rows.once(
            (q.device, page_size, causal, store),
            lambda: plan_pieces(rows, page_size, q.device, causal=causal, stored=store),
        )
        out = torch.empty_like(q)
        for pieces in plan:
            keys = pages.index_select(1, pieces.table).flatten(1, 2)  # (2, B * T, kv heads, D)
            keys.index_copy_(1, pieces.own, kv.index_select(1, pieces.token))
            some = q.index_select(0, pieces.query)  # (B * W, query heads, D)
            attended = _attend_pieces(some, keys, pieces)
            out[pieces.target] = attended if pieces.real is None else attended[pieces.real]
        return out.flatten(-2)

    def choose_experts(
        self, logits: Tensor, bias: Tensor, per_token: int, scale: float, *, normalise: bool
    ) -> tuple[Tensor, Tensor]:
        scores = formulas.sigmoid(logits)
        choice = (scores + bias).topk(per_token, dim=-1, sorted=True).indices
        weight = scores.gather(-1, choice)
        if normalise:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return choice, (weight * scale).float()

    def experts(self, x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        per_token = choice.shape[1]
        chosen, order = choice.flatten().sort(stable=True)  # (N * K): token-and-choice pairs, expert by expert
        counts = torch.bincount(chosen, minlength=up.shape[0])
        room = counts.clamp(min=MIN_GEMM_ROWS) * (counts > 0)  # padded here, so that `linear` need not pad
        shift = (room - counts).cumsum(0) - (room - counts)
        place = torch.arange(len(order), device=x.device) + shift[chosen]  # each pair's place among all padded rows
        sizes = room.tolist()
        token = place.new_zeros(sum(sizes)).index_copy_(0, place, order // per_token)
        outputs = [
            self.linear(F.relu(self.linear(mine, up[expert])).square_(), down[expert])
            for expert, mine in enumerate(x.index_select(0, token).split(sizes))
            if len(mine)
        ]
        back = torch.empty_like(order).index_copy_(0, order, place)
        out = torch.cat(outputs).index_select(0, back).unflatten(0, (-1, per_token))
        summed: Tensor = (out * weight[..., None].to(x.dtype)).sum(dim=1)
        return summed

    def squared_relu(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def _causal_conv(line: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the SiLU of the depthwise causal convolution of the last L tokens of each row: (R, L, C) float32.

    line (R, W + L, C): the W inputs before the L tokens, then the tokens. weight (C, W), bias (C,).
    """
    width = weight.shape[1]
    length = line.shape[1] - width
    wide, taps = line.float(), weight.float().T.contiguous()
    out = bias.float()
    for tap in range(width):  # the last tap multiplies the current token
        out = torch.addcmul(out, wide[:, tap + 1 : tap + 1 + length], taps[tap])
    silu: Tensor = out.div_(torch.exp(-out).add_(1))  # the same formula as in model.kernels.formulas
    return silu


def _scan_chunks(
    x: Tensor,  # (R, G, heads, Q, head_dim): G chunks of Q tokens
    dt: Tensor,  # (R, G, heads, Q)
    decay: Tensor,  # (heads,)
    B: Tensor,  # (R, G, groups, Q, state)
    C: Tensor,  # (R, G, groups, Q, state)
    states: Tensor,  # (R, heads, head_dim, state)
) -> tuple[Tensor, Tensor]:
    """Scan G chunks as `selective_scan` does -> (y in the shape of x, the last states).

    Only the step from one chunk's state to the next is sequential. Every decay is a product of factors of at most 1, so
    nothing overflows however large the first state is, and a strong decay of one token costs no precision in the
    products that do not contain it.
    """
    groups = B.shape[2]
    C = C.contiguous()
    step = (dt * decay[:, None]).exp()  # (R, G, heads, Q), the decay at each token
    later = torch.ones(SCAN_CHUNK, SCAN_CHUNK, dtype=torch.bool, device=x.device).tril(-1)
    between = torch.where(later, step[..., None], 1.0).cumprod(-2)  # (R, G, heads, Q, Q), decay from j to i, i >= j
    from_start = step.cumprod(-1)  # (R, G, heads, Q)
    x = x * dt[..., None]
    causal = (C @ B.transpose(-1, -2)).tril_()  # (R, G, groups, Q, Q)
    mix = (causal[:, :, :, None] * between.unflatten(2, (groups, -1))).flatten(2, 3)

    # the heads of a group share B and C, so one product serves all of them
    added = _by_group(x * between[..., -1, :, None], groups).transpose(-1, -2) @ B  # (R, G, groups, heads * dim, state)
    added = added.unflatten(3, (-1, x.shape[-1])).flatten(2, 3)
    before = []
    for chunk in range(x.shape[1]):
        before.append(states)
        states = torch.addcmul(added[:, chunk], from_start[:, chunk, :, -1, None, None], states)
    seeds = torch.stack(before, dim=1).unflatten(2, (groups, -1)).flatten(3, 4)  # (R, G, groups, heads * dim, state)
    seeded: Tensor = (C @ seeds.transpose(-1, -2)).unflatten(-1, (-1, x.shape[-1])).transpose(3, 4).flatten(2, 3)
    return torch.addcmul(mix @ x, seeded, from_start[..., None]), states


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Join the heads of each group: (R, G, heads, Q, head_dim) -> (R, G, groups, Q, heads of a group * head_dim)."""
    grouped: Tensor = x.unflatten(2, (groups, -1)).transpose(3, 4).flatten(-2)
    return grouped


def _attend_pieces(q: Tensor, kv: Tensor, pieces: Pieces) -> Tensor:
    """Return the attention of B pieces: q (B * W, query heads, D) over kv (2, B * T, kv heads, D) -> the shape of q.

    A query sees the first keys of its own piece, as many as `pieces.visible` says.
    """
    batch = len(pieces.visible)
    k, v = kv.unflatten(1, (batch, -1)).transpose(2, 3)  # (B, kv heads, T, D)
    # the query heads that share a kv head are treated as more queries of that head: fewer and larger products
    q = q.unflatten(1, (k.shape[1], -1)).unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4)  # (B, kv, repeat, W, D)
    visible = pieces.visible if pieces.visible.shape[1] == 1 else pieces.visible.repeat(1, q.shape[2])
    mask = q.new_zeros(batch, 1, visible.shape[1], k.shape[2])
    later = torch.arange(pieces.seen, k.shape[2], device=q.device) >= visible[:, None, :, None]
    mask[..., pieces.seen :].masked_fill_(later, -torch.inf)
    folded = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask)
    out: Tensor = folded.unflatten(2, q.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    return out
