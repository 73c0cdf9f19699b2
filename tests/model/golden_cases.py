"""Loads the golden cases of `golden/`: inputs, expected ids and expected tensors. golden/README.md describes them."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoint"


@functools.cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
    return document


@functools.cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


def cases(kind: str) -> list[dict[str, Any]]:
    """Return every case of one kind, in file order. If a case names its prompt, the tokens are added as `prompt_ids`.

    Raises KeyError if there is no case of this kind.
    """
    document = _document()
    found = [dict(case) for case in document["cases"] if case["kind"] == kind]
    if not found:
        raise KeyError(f"no golden case of kind {kind!r}")
    for case in found:
        if "prompt" in case:
            case["prompt_ids"] = list(document["prompts"][case["prompt"]])
    return found


def tensor(name: str) -> torch.Tensor:
    """Return the expected tensor of this name: float32, or int16 token ids for the `*.xt` traces."""
    return _tensors()[name]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max|got - expected| / max|expected|. Each case limits it by its `tolerance`."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    expected = expected.double()
    return float((got.double().cpu() - expected).abs().max() / expected.abs().max())
