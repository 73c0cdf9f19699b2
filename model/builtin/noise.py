"""Makes builtin:noise, random weights in the released layout: `python -m model.builtin.noise [FOLDER]`.

The layout is that of a released checkpoint (config.json, tokenizer.json, bfloat16 shards, index; about 1 MB together),
and the weights are random but always the same: the model runs every code path and generates noise. As in the released
model, attention heads x head_dim (4 x 32) is not hidden_size (64), and Mamba heads x head_dim (6 x 16) is neither
hidden_size nor `expand` times it.

The weights are made from integers alone: each tensor has a Philox stream, keyed by its name, and the sum of twelve
16-bit words gives a nearly normal number, which is scaled in float64 and then rounded to bfloat16. So they are the same
on every machine and with every numpy version.

SCALES were chosen by running tests/model/reference.py over six prompts (96 tokens each, blocks of 16, threshold 0.8)
and changing three numbers until blocks needed different numbers of steps. The head sets the range of the confidences;
the time conditioning (t_block, tables) sets how much they change between steps and blocks. The head of the context
tower is weaker, so that AR does not repeat itself.
"""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from model.checkpoint.config import TwoTowerConfig, expected_tensors
from model.checkpoint.reader import BUILTIN
from model.checkpoint.writer import write_checkpoint

SEED = 20260626
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")  # ids 0 to 3; byte b is id 4 + b

CONFIG: Mapping[str, object] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "vocab_size": 260,
    "hybrid_override_pattern": "MEM*EMEM*E",
    "num_hidden_layers": 10,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mask_token_id": 3,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "time_step_limit": [0.0, float("inf")],
    "chunk_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "sliding_window": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 16,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
}

# Name ending, mean, standard deviation; the first ending that matches counts. Matrices that match none have a standard
# deviation of 1 / sqrt(inputs), so that their outputs are about as large as their inputs.
SCALES: tuple[tuple[str, float, float], ...] = (
    ("embeddings.weight", 0.0, 1.0),
    ("context_lm_head.weight", 0.0, 0.4),
    ("lm_head.weight", 0.0, 0.66),
    ("t_block.1.weight", 0.0, 0.25),
    ("norm_f.weight", 1.0, 0.1),
    ("norm.weight", 1.0, 0.1),
    ("e_score_correction_bias", 0.0, 0.05),
    ("conv1d.weight", 0.0, 0.5),
    ("conv1d.bias", 0.0, 0.1),
    ("dt_bias", -2.0, 1.0),
    ("A_log", 1.0, 0.7),
    (".D", 1.0, 0.3),
    (".bias", 0.0, 0.1),
)
TABLE_DEVIATION = 0.375  # standard deviation for scale_shift_tables.{i}, whose names have no common ending


def make(folder: Path) -> None:
    """Write the checkpoint's files into `folder`, which is created if it is missing."""
    shapes = expected_tensors(TwoTowerConfig.from_dict(CONFIG))
    tensors = {name: random_tensor(name, shape) for name, shape in shapes.items()}
    write_checkpoint(folder, CONFIG, tokenizer_json(), tensors)


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return random weights for the tensor `name` in bfloat16. They depend on SEED, name, shape and scale alone."""
    count = int(np.prod(shape))
    key = int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(3 * count).astype("<u8").view("<u2").reshape(count, 12)
    # The sum of 12 uniform numbers in [0, 1) has variance 1. Added as integers, the sum is exact.
    normal = (words.astype(np.int64).sum(axis=1) - 6 * 65535) / 65536.0
    mean, deviation = _scale(name, shape)
    return torch.from_numpy(mean + deviation * normal).to(torch.bfloat16).reshape(shape)


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the mean and the standard deviation of the weights `name`; see SCALES."""
    for ending, mean, deviation in SCALES:
        if name.endswith(ending):
            return mean, deviation
    if name.startswith("scale_shift_tables."):
        return 0.0, TABLE_DEVIATION
    return 0.0, shape[-1] ** -0.5


def tokenizer_json() -> dict[str, object]:
    """Return the tokenizer.json of a byte-level BPE without merges: the special tokens, then one token per byte.

    It adds no special tokens to a text.
    """
    alphabet = _byte_letters()
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *(alphabet[byte] for byte in range(256))))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def _byte_letters() -> dict[int, str]:
    """Return the letter that byte-level tokenizers write for each byte: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILTIN["noise"])
