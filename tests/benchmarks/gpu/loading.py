"""Measures loading a checkpoint to the device in GB/s, first from a local disk and then from the page cache."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.config import TwoTowerConfig, expected_tensors
from model.checkpoint.loader import load_towers
from model.checkpoint.reader import open_checkpoint
from model.network.two_tower import TwoTower

PIECE = 16 * 2**20  # bytes written at once


def load_rates(raw: Mapping[str, object], device: torch.device, folder: Path | None = None) -> dict[str, Any] | None:
    """Write a checkpoint of this config.json into a temporary folder, load it, and return the GB/s of each tower.

    The result has them for "disk" and for "cache"; it is None if the disk has less than twice the needed room.
    """
    config = TwoTowerConfig.from_dict(dict(raw))
    need = 2 * sum(math.prod(shape) for shape in expected_tensors(config).values())
    with tempfile.TemporaryDirectory(dir=folder) as name:
        if shutil.disk_usage(name).free < 2 * need:
            return None
        file = write_checkpoint(Path(name), raw, config)
        pair, checkpoint = TwoTower(config, torch.bfloat16, [device]), open_checkpoint(name)
        found: dict[str, Any] = {"bytes": need}
        for source in ("warm-up", "disk", "cache"):
            if source == "disk":
                _forget(file)
            loaded = load_towers(checkpoint, pair.checkpoint_targets())
            found[source] = {one.what: one.bytes / one.seconds / 1e9 for one in loaded}
        return found


def write_checkpoint(folder: Path, raw: Mapping[str, object], config: TwoTowerConfig) -> Path:
    """Write random bits as bfloat16 in the released layout, as one shard."""
    (folder / "config.json").write_text(json.dumps(dict(raw)))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_tensors(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    file = folder / "model.safetensors"
    noise = os.urandom(min(PIECE, end))
    with file.open("wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)
        for start in range(0, end, PIECE):
            out.write(noise[: end - start])
        out.flush()
        os.fsync(out.fileno())
    return file


def _forget(file: Path) -> None:
    """Drop a file from the page cache."""
    if hasattr(os, "posix_fadvise"):  # exists on Linux
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
