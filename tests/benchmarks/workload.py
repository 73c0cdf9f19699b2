"""Generates the workloads of the benchmarks: seeded prompts, lengths and thresholds."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.requests import GenerationParams, Mode, Request

FIRST_TEXT_ID = 4
"""Lowest id of ordinary text: lower ids are special tokens in both small checkpoints."""
Z99 = 2.326  # standard deviations from the median to the 99th percentile

THRESHOLDS = (0.5, 0.5, 0.5, 0.6, 0.6, 0.7, 0.8, 0.99)
"""Thresholds, of which each row draws one. They stand in for easy and hard texts: with random weights a single
threshold gives every row about the same steps per block. On builtin:noise a block takes 1 to 16 steps, about 5.5 on
average (published: 5.4)."""


def log_normal(rng: np.random.Generator, count: int, *, median: float, p99: float, longest: int) -> NDArray[np.int64]:
    """Return (count,) whole numbers from 1 to `longest`, log-normal with this median and 99th percentile."""
    sigma = math.log(p99 / median) / Z99
    lengths = np.rint(median * np.exp(sigma * rng.standard_normal(count))).astype(np.int64)
    return lengths.clip(1, longest)


def requests(
    count: int,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    vocabulary: int,
    thresholds: Sequence[float] = THRESHOLDS,
    mode: Mode = "diffusion",
    template: int = 0,
    prefix_tokens: int = 0,
    seed: int = 0,
) -> list[Request]:
    """Return requests of equal lengths without an EOS; prompts are random after `template` tokens that all share."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(FIRST_TEXT_ID, vocabulary, template).tolist()
    made = []
    for number in range(count):
        own = rng.integers(FIRST_TEXT_ID, vocabulary, prompt_tokens - template).tolist()
        threshold = float(rng.choice(thresholds))
        params = GenerationParams(mode=mode, max_new_tokens=max_new_tokens, confidence_threshold=threshold)
        made.append(Request(str(number), shared + own, params, prefix_tokens))
    return made
