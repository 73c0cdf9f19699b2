"""The golden cases of `golden/`: inputs, expected ids and expected tensors, as golden/README.md describes them."""

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
    """Every case of one kind, in file order. A prompt named by `prompt` stands resolved in `prompt_ids`."""
    document = _document()
    found = [dict(case) for case in document["cases"] if case["kind"] == kind]
    if not found:
        raise KeyError(f"no golden case of kind {kind!r}")
    for case in found:
        if "prompt" in case:
            case["prompt_ids"] = list(document["prompts"][case["prompt"]])
    return found


def tensor(name: str) -> torch.Tensor:
    """The expected tensor of this name: float32, or int16 token ids for the `*.xt` traces."""
    return _tensors()[name]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max|got - expected| / max|expected|, the measure that each case's `tolerance` limits."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    expected = expected.double()
    return float((got.double().cpu() - expected).abs().max() / expected.abs().max())
