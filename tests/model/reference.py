"""Implements the model's formulas slowly and plainly; the tests compare the engine with this reference.

It computes one row, keeps no cache between forwards and shares no code with the model's layers: every forward starts
from the whole token list, and whatever is sequential in a formula is computed token by token. In float64 (`dtype`) its
results show how large the rounding errors of float32 are.

Shapes: S tokens of this forward, P tokens before them, H hidden_size, V vocab_size; Mamba: M heads of D channels, G
groups, N states, C conv channels, K conv taps; attention: Q query heads, J key/value heads, d head_dim; MoE: X experts.

The state of a layer is a dict. Mamba: {"conv_state": (C, K), the last raw conv inputs, oldest first, "ssm_state": (M,
D, N)}; attention: {"key" and "value": (J, P, d)}; MoE: {}.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint.config import TIME_EMBEDDING_SIZE, LayerKind, Towers, expected_tensors
from model.checkpoint.loader import load_tensors
from model.checkpoint.reader import Checkpoint, open_checkpoint
from model.requests import GenerationParams

State = dict[str, Tensor]
Sampler = Callable[[Tensor, int, int, int], int]
"""A function that chooses a token id; it is called with (logits (V,), block, step, position).

In a diffusion block the logit of the mask id is -inf, step counts from 0, and position is the place in the block. In
the AR modes block is the index of the new token, and step and position are 0.
"""


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """The tokens that the reference generated, and its counters.

    A diffusion block that holds an EOS is kept whole; the completion is cut to max_new_tokens.
    """

    token_ids: tuple[int, ...]
    forwards: int
    """Number of denoiser forwards; 0 in AR mode."""
    steps_per_block: tuple[int, ...]
    trace: tuple[tuple[int, ...], ...]
    """The blocks that the denoiser forwards of a diffusion run were given, in order."""


def greedy(logits: Tensor, block: int, step: int, position: int) -> int:
    """Return the most probable token. This is the default Sampler."""
    del block, step, position
    return int(logits.argmax())


class Reference:
    """The weights of one checkpoint under their checkpoint names, and the forwards over them."""

    def __init__(
        self, checkpoint: Checkpoint | str, dtype: torch.dtype = torch.float32, towers: Towers = "both"
    ) -> None:
        checkpoint = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        checkpoint.validate(towers)
        self.config, self.dtype = checkpoint.config, dtype
        shapes = expected_tensors(self.config, towers)
        self.weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        load_tensors(checkpoint, self.weights)

    # Forwards

    def context_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (S, V) of the next token after every position of ids (S,)."""
        return self._context(ids)[0]

    def context_state(self, ids: Sequence[int]) -> list[State]:
        """Return the state of every layer after the last token. Each tensor has a leading batch dimension of 1."""
        return [{name: part[None] for name, part in state.items()} for state in self._context(ids)[1]]

    def denoiser_logits(self, prompt_ids: Sequence[int], block_ids: Sequence[int], t: float) -> Tensor:
        """Return the logits (S, V) of one denoiser forward over a block (S,) after the prompt. The mask id is not
        suppressed."""
        return self._denoise(self._context(prompt_ids)[1], block_ids, t)

    def mock_ar_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (V,) of the denoiser tower for the last token alone, without time conditioning. All tokens
        before it are the context."""
        before = self._context(ids[:-1])[1] if len(ids) > 1 else self._empty_states()
        return self._tower("denoiser_tower", "lm_head", ids[-1:], before, causal=True)[0][-1]

    def _context(self, ids: Sequence[int]) -> tuple[Tensor, list[State]]:
        return self._tower("context_tower", "context_lm_head", ids, self._empty_states(), causal=True)

    def _denoise(self, states: list[State], block_ids: Sequence[int], t: float) -> Tensor:
        time = self._time(t)
        modulation = [time + self.weights[f"scale_shift_tables.{i}"] for i in range(self.config.num_layers)]
        return self._tower("denoiser_tower", "lm_head", block_ids, states, causal=False, modulation=modulation)[0]

    # Generation

    @torch.inference_mode()
    def generate(
        self, prompt_ids: Sequence[int], params: GenerationParams, sampler: Sampler = greedy
    ) -> ReferenceResult:
        """Generate one row. The sampler applies temperature, top_k and top_p.

        Raises ValueError if there are stop strings, or if the temperature is above 0 and the sampler is greedy.
        """
        if params.stop or (params.temperature > 0 and sampler is greedy):
            raise ValueError("the reference knows no stop strings, and samples only through a sampler")
        if params.mode == "diffusion":
            return self._generate_blocks(list(prompt_ids), params, sampler)
        ids, new = list(prompt_ids), list[int]()
        while len(new) < params.max_new_tokens and not (new and new[-1] in params.eos_ids):
            logits = self.context_logits(ids)[-1] if params.mode == "ar" else self.mock_ar_logits(ids)
            new.append(sampler(logits, len(new), 0, 0))
            ids.append(new[-1])
        return ReferenceResult(tuple(new), len(new) if params.mode == "mock_ar" else 0, (), ())

    def _generate_blocks(self, ids: list[int], params: GenerationParams, sampler: Sampler) -> ReferenceResult:
        new, steps, trace = list[int](), list[int](), list[tuple[int, ...]]()
        while len(new) < params.max_new_tokens and not set(new) & set(params.eos_ids):
            states = self._context(ids + new)[1]  # the same for all steps of this block
            block = [self.config.mask_token_id] * params.block_size
            masked = list(range(params.block_size))
            step = 0
            while masked:
                trace.append(tuple(block))
                logits = self._denoise(states, block, len(masked) / params.block_size)
                logits[:, self.config.mask_token_id] = -math.inf
                probabilities = logits.softmax(-1)
                predicted = {i: sampler(logits[i], len(steps), step, i) for i in masked}
                confidence = {i: float(probabilities[i, predicted[i]]) for i in masked}
                above = sum(c > params.confidence_threshold for c in confidence.values())
                # On the last step, ceil(masked / 1) commits all of them.
                commit = max(above, 1, math.ceil(len(masked) / (params.steps_per_block - step)))
                by_confidence = sorted(masked, key=lambda i: confidence[i])
                for i in by_confidence[-commit:]:
                    block[i] = predicted[i]
                masked = sorted(by_confidence[:-commit])
                step += 1
            steps.append(step)
            new += block
        return ReferenceResult(tuple(new[: params.max_new_tokens]), len(trace), tuple(steps), tuple(trace))

    # One tower

    @torch.inference_mode()
    def _tower(
        self,
        tower: str,
        head: str,
        ids: Sequence[int],
        states: list[State],
        *,
        causal: bool,
        modulation: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Run one tower over ids (S,) that follow `states`; return the logits (S, V) and the states after the ids.

        modulation: shift, scale and gate (3, H) for each layer. Mamba and attention layers modulate before they
        normalise, MoE layers after.
        """
        x = self.weights[f"{tower}.embeddings.weight"][torch.tensor(ids, dtype=torch.long)]  # (S, H)
        mixers = {"mamba": self._mamba, "attention": self._attention, "moe": self._moe}
        after = []
        for i, kind in enumerate(self.config.layer_kinds):
            layer = f"{tower}.layers.{i}"
            norm = self.weights[f"{layer}.norm.weight"]
            shift, scale, gate = (0.0, 0.0, 1.0) if modulation is None else modulation[i]
            if kind == "moe":
                mixed = self._norm(x, norm) * (1 + scale) + shift
            else:
                mixed = self._norm(x * (1 + scale) + shift, norm)
            mixed, state = mixers[kind](f"{layer}.mixer", mixed, states[i], causal)
            x = x + gate * mixed
            after.append(state)
        return self._norm(x, self.weights[f"{tower}.norm_f.weight"]) @ self.weights[f"{head}.weight"].T, after

    def _empty_states(self) -> list[State]:
        c = self.config
        ssm, keys = (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size), (c.num_key_value_heads, 0, c.head_dim)
        shapes: dict[LayerKind, dict[str, tuple[int, ...]]] = {
            "mamba": {"conv_state": (c.conv_dim, c.conv_kernel), "ssm_state": ssm},
            "attention": {"key": keys, "value": keys},
            "moe": {},
        }
        return [
            {name: torch.zeros(shape, dtype=self.dtype) for name, shape in shapes[kind].items()}
            for kind in c.layer_kinds
        ]

    def _time(self, t: float) -> Tensor:
        """Return the time conditioning (3, H) for t in [0, 1].

        The sinusoids of 1000 t go through an MLP and a projection to three rows. Every layer adds its own table to
        them.
        """
        half = TIME_EMBEDDING_SIZE // 2
        angles = t * 1000.0 * 10000.0 ** (-torch.arange(half, dtype=self.dtype) / half)
        x = torch.cat([angles.cos(), angles.sin()])
        x = F.silu(self._linear("t_embedder.mlp.0", x))
        x = F.silu(self._linear("t_embedder.mlp.2", x))
        return self._linear("t_block.1", x).view(3, self.config.hidden_size)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return F.linear(x, self.weights[f"{name}.weight"], bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon) * weight

    # Mixers: each takes (S, H) and the layer's state, and returns (S, H) and the state afterwards

    def _attention(self, name: str, x: Tensor, state: State, causal: bool) -> tuple[Tensor, State]:
        c = self.config
        q = self._linear(f"{name}.q_proj", x).view(-1, c.num_attention_heads, c.head_dim).transpose(0, 1)  # (Q, S, d)
        k = self._linear(f"{name}.k_proj", x).view(-1, c.num_key_value_heads, c.head_dim).transpose(0, 1)  # (J, S, d)
        v = self._linear(f"{name}.v_proj", x).view(-1, c.num_key_value_heads, c.head_dim).transpose(0, 1)
        k = torch.cat([state["key"], k], dim=1)  # (J, P + S, d)
        v = torch.cat([state["value"], v], dim=1)
        shared = c.num_attention_heads // c.num_key_value_heads
        scores = q @ k.repeat_interleave(shared, 0).transpose(1, 2) / math.sqrt(c.head_dim)  # (Q, S, P + S)
        if causal:
            query_at = torch.arange(len(x))[:, None] + state["key"].shape[1]
            scores = scores.masked_fill(torch.arange(k.shape[1]) > query_at, -math.inf)
        y = scores.softmax(-1) @ v.repeat_interleave(shared, 0)  # (Q, S, d)
        return self._linear(f"{name}.o_proj", y.transpose(0, 1).flatten(1)), {"key": k, "value": v}

    def _mamba(self, name: str, x: Tensor, state: State, causal: bool) -> tuple[Tensor, State]:
        """Run the Mamba mixer, which is causal in both towers: the denoiser also scans its block forwards."""
        del causal
        c, taps = self.config, self.config.conv_kernel
        z, raw, dt = _split(self._linear(f"{name}.in_proj", x), [c.mamba_inner, c.conv_dim, c.mamba_num_heads])
        inputs = torch.cat([state["conv_state"], raw.T], dim=1)  # (C, K + S)
        kernel = self.weights[f"{name}.conv1d.weight"][:, 0]  # (C, K); the last tap is for the current token
        windows = torch.stack([inputs[:, i + 1 : i + 1 + taps] for i in range(len(x))])  # (S, C, K)
        xbc = F.silu((windows * kernel).sum(-1) + self.weights[f"{name}.conv1d.bias"])  # (S, C)
        y, ssm = self._scan(name, xbc, dt, state["ssm_state"])
        gated = (y * F.silu(z)).view(len(x), c.n_groups, -1)  # each group is normalised by itself, after the gate
        normed = self._norm(gated, self.weights[f"{name}.norm.weight"].view(c.n_groups, -1)).flatten(1)
        return self._linear(f"{name}.out_proj", normed), {"conv_state": inputs[:, -taps:], "ssm_state": ssm}

    def _scan(self, name: str, xbc: Tensor, dt: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Run the scan over xbc (S, C), dt (S, M) and the state s (M, D, N); return y (S, M D) and the last state.

        For each token, s <- exp(dt A) s + dt (x outer B) and y = s C + D x.
        """
        c = self.config
        group_states = c.n_groups * c.ssm_state_size
        u, b, g = _split(xbc, [c.mamba_inner, group_states, group_states])
        u = u.view(-1, c.mamba_num_heads, c.mamba_head_dim)  # (S, M, D)
        heads_a_group = c.mamba_num_heads // c.n_groups
        b = b.view(-1, c.n_groups, c.ssm_state_size).repeat_interleave(heads_a_group, 1)  # (S, M, N)
        g = g.view(-1, c.n_groups, c.ssm_state_size).repeat_interleave(heads_a_group, 1)
        dt = F.softplus(dt + self.weights[f"{name}.dt_bias"]).clamp(*c.time_step_limit)  # (S, M)
        decay = (dt * -self.weights[f"{name}.A_log"].exp()).exp()[:, :, None, None]
        added = (dt[:, :, None] * u)[..., None] * b[:, :, None, :]  # (S, M, D, N)
        skip = self.weights[f"{name}.D"][:, None] * u
        y = torch.empty_like(u)
        for i in range(len(u)):
            s = decay[i] * s + added[i]
            y[i] = (s @ g[i][:, :, None]).squeeze(-1) + skip[i]
        return y.flatten(1), s

    def _moe(self, name: str, x: Tensor, state: State, causal: bool) -> tuple[Tensor, State]:
        del causal
        c = self.config
        scores = (x.double() @ self.weights[f"{name}.gate.weight"].double().T).sigmoid()  # (S, X)
        ranked = scores + self.weights[f"{name}.gate.e_score_correction_bias"].double()
        chosen = ranked.topk(c.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = (weights * c.routed_scaling_factor).to(x.dtype)
        y = self._mlp(f"{name}.shared_experts", x)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, rank = (chosen == expert).nonzero(as_tuple=True)
            y[token] += weights[token, rank, None] * self._mlp(f"{name}.experts.{expert}", x[token])
        return y, state

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        return self._linear(f"{name}.down_proj", F.relu(self._linear(f"{name}.up_proj", x)).square())


def _split(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(x, sizes, dim=-1)
