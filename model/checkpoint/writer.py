"""Writes a checkpoint in the released layout: config.json, tokenizer.json, a bfloat16 shard for each tower, index."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.config import TwoTowerConfig, expected_tensors


def write_checkpoint(
    folder: Path, config: Mapping[str, object], tokenizer: object, tensors: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint into `folder`, which is created if it is missing.

    config: the content of config.json. tokenizer: the content of tokenizer.json. tensors: by checkpoint name, in any
    dtype; they are rounded to bfloat16, and those that the config does not name are left out. Raises CheckpointError if
    the config is not supported, and KeyError if a tensor is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1) + "\n")
    sizes = TwoTowerConfig.from_dict(config)
    context = expected_tensors(sizes, "context")
    denoiser = expected_tensors(sizes).keys() - context.keys()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate((sorted(context), sorted(denoiser)), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        held = {name: tensors[name].to(torch.bfloat16).contiguous() for name in names}
        save_file(held, folder / shard, metadata={"format": "pt"})
        (folder / shard).chmod(0o644)  # the library creates files that only their owner may read
        weight_map |= dict.fromkeys(names, shard)
        total += sum(tensor.nbytes for tensor in held.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
