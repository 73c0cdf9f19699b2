"""Defines the options of `calibrate`, and parses those that are lists on the command line.

An error message is one line that names the option, its value and what the value must be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.calibration.bench import RowLimit
from pipeline.calibration.choice import MIN_AGREEMENT
from pipeline.core.errors import JobError

T = TypeVar("T")
GPU_PRICE = 2.5
"""Price of a GPU-hour if none is given: about what an H100 costs at the cheaper clouds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of `calibrate`, checked when they are made. Raises JobError if a value is impossible."""

    to: str | None = None
    """Folder for the results; None means the folder beside the job's output."""
    sample: int = 64
    """Number of rows of the sample, if the input has as many usable rows."""
    minutes: float = 30.0
    """Time limit for measuring in minutes, without the loading of the model."""
    price: float | None = None
    """Price of an hour of one GPU, or of one replica on CPUs. None means GPU_PRICE with GPUs, unknown on CPUs."""
    currency: str = "USD"
    """Name of the currency of the price, as it is shown."""
    thresholds: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 0.99)
    """Confidence thresholds to measure, each with every one of `steps`."""
    steps: tuple[int, ...] = (4, 8, 16)
    """Limits of denoiser forwards per block to measure."""
    rows: tuple[RowLimit, ...] = (1, 16, "auto")
    """Row limits to measure every setting at."""
    max_new_tokens: int | None = None
    """Limit of new tokens per row; None, or more than the job's limit, means that limit. A lower limit makes the
    calibration quicker."""
    min_agreement: float = MIN_AGREEMENT
    """Smallest mean agreement with AR, from 0 to 1, at which a point may be chosen."""

    def __post_init__(self) -> None:
        _require("--sample", self.sample, self.sample >= 1, "a whole number of at least 1")
        _require("--minutes", self.minutes, 0 < self.minutes < math.inf, "a number above 0")
        _require("--price", self.price, self.price is None or 0 <= self.price < math.inf, "a number of at least 0")
        _require("--min-agreement", self.min_agreement, 0 <= self.min_agreement <= 1, "a share from 0 to 1")
        tokens = self.max_new_tokens
        _require("--max-new-tokens", tokens, tokens is None or tokens >= 1, "a whole number of at least 1")
        good = all(0 <= threshold <= 1 for threshold in self.thresholds)
        _require("--thresholds", self.thresholds, good and bool(self.thresholds), "numbers from 0 to 1")
        good = all(steps >= 1 for steps in self.steps)
        _require("--steps", self.steps, good and bool(self.steps), "whole numbers of at least 1")
        good = all(rows == "auto" or rows >= 1 for rows in self.rows)
        _require("--rows", self.rows, good and bool(self.rows), "whole numbers of at least 1, or max")


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers in an option's text, each once: `0.7,0.8` gives (0.7, 0.8).

    Raises JobError if an item is not a number.
    """
    return _list(option, text, float, "numbers such as 0.8,0.9")


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers in an option's text, each once: `4,16` gives (4, 16).

    Raises JobError if an item is not a whole number.
    """
    return _list(option, text, int, "whole numbers such as 4,16")


def row_limits(option: str, text: str) -> tuple[RowLimit, ...]:
    """Return the row limits in an option's text, each once: `1,16,max` gives (1, 16, "auto").

    Raises JobError if an item is not a row limit.
    """
    return _list(option, text, _row_limit, "whole numbers or max, such as 1,16,max")


def _row_limit(text: str) -> RowLimit:
    return "auto" if text in ("max", "auto") else int(text)


def _list(option: str, text: str, parse: Callable[[str], T], rule: str) -> tuple[T, ...]:
    try:
        return tuple(dict.fromkeys(parse(item.strip()) for item in text.split(",")))
    except ValueError:
        raise JobError(f"{option} {text}: give {rule}") from None


def _require(option: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise JobError(f"{option} {shown}: it must be {rule}")
