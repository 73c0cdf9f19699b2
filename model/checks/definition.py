"""Computes what the kernels compute, straight from the formulas: in float64 on the CPU, one token at a time.

It is written from the formulas in model.kernels and the description of the model, not from any kernel, so that it does
not repeat a kernel's mistake. Shapes: R rows, N tokens of all rows, C conv channels, K conv taps, M Mamba heads of D
channels, S states; L tokens of one row, Q query heads, J key/value heads, d head_dim; H hidden size, F expert width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.protocol import ScanInputs


def mamba_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (N, M D), and each row's last conv inputs (R, C, K) and last state (R, M, D, S); change no state.

    Computes a causal convolution and SiLU, then s <- exp(dt A) s + dt x (outer) B; y = s C + D x (Mamba-2, arXiv
    2405.21060).
    """
    weights, lengths = inputs.weights, list(inputs.rows.lengths)
    kernel, bias, decay, skip = (wide(z) for z in (weights.conv_weight, weights.conv_bias, weights.decay, weights.D))
    heads, head_dim, size = inputs.ssm_states.shape[1:]
    group_of = torch.arange(heads) // (heads // weights.groups)
    steps = (wide(inputs.dt) + wide(weights.dt_bias)).exp().log1p().clamp(*weights.dt_limit)
    out, windows, states = list[Tensor](), list[Tensor](), list[Tensor]()
    for seed, xbc, dt in zip(inputs.rows.seeds, wide(inputs.xbc).split(lengths), steps.split(lengths), strict=True):
        window, state = wide(inputs.conv_states[seed]), wide(inputs.ssm_states[seed])
        if seed < 0:
            window, state = torch.zeros_like(window), torch.zeros_like(state)
        for token, step in zip(xbc, dt, strict=True):
            window = torch.cat([window[:, 1:], token[:, None]], dim=1)  # the last tap multiplies the current token
            mixed = (window * kernel).sum(1) + bias
            mixed = mixed * mixed.sigmoid()
            x, b, c = mixed.split([heads * head_dim, weights.groups * size, weights.groups * size])
            x, b, c = x.view(heads, head_dim), b.view(-1, size)[group_of], c.view(-1, size)[group_of]
            state = (step * decay).exp()[:, None, None] * state + (step[:, None] * x)[:, :, None] * b[:, None, :]
            out.append((state @ c[:, :, None]).squeeze(-1) + skip[:, None] * x)
        windows.append(window)
        states.append(state)
    return torch.stack(out).flatten(1), torch.stack(windows), torch.stack(states)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Return the attention (L, Q d) of one row: q (L, Q, d) over k, v (P + L, J, d), P tokens of context, then its own.

    If causal, a token sees the context and the row's own tokens up to itself; otherwise all of them.
    """
    q, k, v = wide(q), wide(k), wide(v)
    length, total, shared = len(q), len(k), q.shape[1] // k.shape[1]
    last_visible = torch.arange(total - length, total) if causal else torch.full((length,), total - 1)
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // shared].T / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.arange(total) > last_visible[:, None], -torch.inf)
        out[:, head] = scores.softmax(-1) @ v[:, head // shared]
    return out.flatten(1)


def experts(x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts for each token, (L, H).

    Takes x (L, H), choice (L, K) of the experts up (E, F, H) and down (E, H, F), and weight (L, K).
    """
    x, weight, choice = wide(x), wide(weight), choice.cpu()
    out = torch.zeros_like(x)
    for expert in choice.unique().tolist():
        token, rank = (choice == expert).nonzero(as_tuple=True)
        hidden = (x[token] @ wide(up[expert]).T).relu().square()
        out[token] += weight[token, rank, None] * (hidden @ wide(down[expert]).T)
    return out


def wide(x: Tensor) -> Tensor:
    """Return a tensor with the values of x in float64 on the CPU, without gradient."""
    return x.detach().to("cpu", torch.float64)


def relative_error(got: Tensor, wanted: Tensor, rows: Sequence[int]) -> float:
    """Return the largest max|got - wanted| / max|wanted| over the rows; infinity if a value is not finite.

    got, wanted: (N, …). `rows`: the number of tokens of each row, one row after the other. Each row is measured
    separately, so that large numbers in one row do not hide an error in another.
    """
    errors = []
    for mine, right in zip(wide(got).split(list(rows)), wide(wanted).split(list(rows)), strict=True):
        error = float((mine - right).abs().max() / right.abs().max())
        errors.append(error if error == error else float("inf"))
    return max(errors)
