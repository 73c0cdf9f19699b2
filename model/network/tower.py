"""Defines the form that both towers have: embedding, pre-norm residual layers of three kinds, final norm and head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint.config import TwoTowerConfig
from model.kernels import kernels_for
from model.kernels.logits import Draws, Head, Logits
from model.kernels.protocol import Kernels
from model.network.context_cache import LayerState
from model.network.layers.attention import Attention
from model.network.layers.linear import Linear
from model.network.layers.mamba2 import Mamba2
from model.network.layers.moe import MoE
from model.network.layers.norm import RMSNorm
from model.network.layers.time import Conditioning
from model.network.sampling import choose
from model.runtime.ragged_batch import RaggedBatch


class Layer(nn.Module):
    """A residual layer, x + mixer(norm(x)), whose mixer is Mamba-2, attention or MoE.

    In a denoiser forward with time, the conditioning of each row also shifts and scales x before the norm in Mamba and
    attention layers, and the output of the norm in MoE layers. The mixer's output is multiplied by the gate before it
    is added to x.
    """

    def __init__(self, config: TwoTowerConfig, index: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kind = config.layer_kinds[index]
        mixers = {"mamba": Mamba2, "attention": Attention, "moe": MoE}
        self.kernels = kernels
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, kernels)
        self.mixer = mixers[self.kind](config, dtype, kernels)

    def forward(
        self, x: Tensor, state: LayerState, rows: RaggedBatch, conditioning: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Return the layer's output (N, H) for x (N, H).

        conditioning (R, 3, H): shift, scale and gate of each row, or None in a forward without time. Mamba and
        attention layers modulate first and then normalise; MoE layers normalise first and then modulate. causal: True
        in the context tower, where the layer also stores the tokens in `state`.
        """
        if conditioning is None:
            plain: Tensor = self.mixer(self.norm(x), state, rows, causal=causal)
            return x + plain
        row_of_token = rows.on(x.device).row_of_token
        normed = self.kernels.modulated_norm(
            x, self.norm.weight, self.norm.eps, conditioning, row_of_token, norm_first=self.kind == "moe"
        )
        mixed: Tensor = self.mixer(normed, state, rows, causal=causal)
        return self.kernels.gated_add(x, mixed, conditioning, row_of_token)


class Tower(nn.Module):
    """One tower. Each layer is on the device of its stage, the embedding on the first and the head on the last device.

    `causal` is True for the context tower, whose forwards store their tokens in the context; the denoiser only reads
    it. Gradients are off.
    """

    def __init__(
        self, config: TwoTowerConfig, devices: Sequence[torch.device], dtype: torch.dtype, *, causal: bool
    ) -> None:
        super().__init__()
        self.devices = tuple(devices)
        self.causal = causal
        self.mask_id = config.mask_token_id
        with devices[0]:
            # made from a tensor, because the initialization by nn.Embedding imports a compiler, which is slow
            table = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
            self.embeddings = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList()
        for i, device in enumerate(devices):
            with device:
                self.layers.append(Layer(config, i, dtype, kernels_for(device)))
        with devices[-1]:
            self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, kernels_for(devices[-1]))
            self.head = Linear(config.hidden_size, config.vocab_size, dtype, kernels_for(devices[-1]))
        self.requires_grad_(False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the hidden states (N, H) of tokens (N,) int64, before the first layer."""
        return F.embedding(tokens, self.embeddings.weight)

    def run(
        self,
        x: Tensor,
        layers: range,
        states: Sequence[LayerState],
        rows: RaggedBatch,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Run the layers `layers`, all on one device: hidden (N, H) -> (N, H). The final norm is not applied.

        states: one for each layer of the tower. A causal tower also stores the tokens in them. conditioning: that of
        the stage to which `layers` belong, or None in a forward without time.
        """
        for place, i in enumerate(layers):
            time = None if conditioning is None else conditioning[place]
            x = self.layers[i](x, states[i], rows, time, causal=self.causal)
        return x

    def logits(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """Return the logits (M, V) float32 of hidden (M, H) before the final norm; only `columns` of them, if given."""
        return self.head_on(hidden)(slice(None), slice(None) if columns is None else columns).float()

    def head_on(self, hidden: Tensor) -> Head:
        """Return a function that computes slices of the logits of hidden (M, H) before the final norm; see Head.

        hidden is normalised once, here. Every call of the function returns a new tensor, in the model's dtype.
        """
        normed: Tensor = self.norm_f(hidden)
        kernels, weight = self.head.kernels, self.head.weight
        return lambda rows, columns: kernels.linear(normed[rows], weight[columns])

    def choose(self, hidden: Tensor, suppress: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """Return the tokens that hidden (M, H) before the final norm predicts, and their confidence.

        suppress (M,) bool: True for positions at which the mask id must not be chosen and gets no probability. draws:
        None if all positions are greedy. See model.network.sampling.choose.
        """
        kernels, (vocab, _), dtype = self.head.kernels, self.head.weight.shape, self.head.weight.dtype
        room, width = kernels.head_workspace, kernels.vocab_slice
        head = self.head_on(hidden)
        return choose(kernels, Logits(head, len(hidden), vocab, suppress, self.mask_id, dtype, room, width), draws)

    def checkpoint_targets(self, tower: str, head: str) -> dict[str, Tensor]:
        """Map the name of each tensor in the checkpoint to the tensor here that it is loaded into.

        Each expert's tensor is loaded into a slice of one tensor. `tower` and `head` are the names of this tower and of
        its head in the checkpoint.
        """
        targets: dict[str, Tensor] = {f"{head}.weight": self.head.weight}
        for name, parameter in self.named_parameters():
            if name.startswith("head."):
                continue
            prefix, _, last = f"{tower}.{name}".rpartition(".")
            if last in ("up", "down"):  # one tensor here for all experts of a layer, one for each in the checkpoint
                for expert, weight in enumerate(parameter.data):
                    targets[f"{prefix}.experts.{expert}.{last}_proj.weight"] = weight
            else:
                targets[f"{tower}.{name}"] = parameter.data
        return targets
