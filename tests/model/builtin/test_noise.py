"""Tests the built-in checkpoint: its command makes the committed files, and it behaves as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint.reader import BUILTIN, open_checkpoint
from model.checkpoint.tokenizer import Tokenizer
from model.requests import GenerationParams
from tests.model.reference import Reference

pytestmark = pytest.mark.slow

PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog.", "1, 2, 3, ", "def f(x):\n    return", "a"]


def test_the_command_reproduces_the_committed_files(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-m", "model.builtin.noise", str(tmp_path)], cwd=root, check=True)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in BUILTIN["noise"].iterdir()}


def test_it_is_a_small_complete_checkpoint_unlike_the_golden_one() -> None:
    checkpoint = open_checkpoint("builtin:noise")
    checkpoint.validate("both")
    config = checkpoint.config
    assert sum(file.stat().st_size for file in BUILTIN["noise"].iterdir()) < 2**20 + 2**16
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert config.attention_inner != config.hidden_size
    assert config.mamba_inner not in (config.hidden_size, 2 * config.hidden_size)
    assert len({info.shard for info in checkpoint.tensors.values()}) == 2


def test_blocks_take_few_and_many_steps() -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint("builtin:noise")
    content = checkpoint.tokenizer_json()
    assert content is not None
    reference = Reference(checkpoint)
    params = GenerationParams(max_new_tokens=96, confidence_threshold=0.8)
    results = [reference.generate(ids, params) for ids in Tokenizer(content).encode_batch(PROMPTS)]
    steps = [count for result in results for count in result.steps_per_block]
    assert min(steps) <= 5
    assert max(steps) >= 10
    assert len({token for result in results for token in result.token_ids}) > 50
