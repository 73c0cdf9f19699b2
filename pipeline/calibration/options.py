"""What `calibrate` is asked to do, and the lists of its command line. A fault is one line that names the option."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.calibration.bench import RowLimit
from pipeline.calibration.choice import MIN_AGREEMENT
from pipeline.core.errors import JobError

T = TypeVar("T")
GPU_PRICE = 2.5
"""Of an hour, where none is given: what an H100 costs at the cheaper clouds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Raises JobError where a value is impossible."""

    to: str | None = None
    """The folder; None: beside the job's output."""
    sample: int = 64
    """Rows."""
    minutes: float = 30.0
    """For measuring, once the model is loaded."""
    price: float | None = None
    """Of an hour of a GPU, or of a replica on CPUs; None: GPU_PRICE, or unknown."""
    currency: str = "USD"
    thresholds: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 0.99)
    steps: tuple[int, ...] = (4, 8, 16)
    rows: tuple[RowLimit, ...] = (1, 16, "auto")
    max_new_tokens: int | None = None
    """Of a row, where that is less than the job's: for a quicker look."""
    min_agreement: float = MIN_AGREEMENT

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
    """`0.7,0.8` -> (0.7, 0.8)."""
    return _list(option, text, float, "numbers such as 0.8,0.9")


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """`4,16` -> (4, 16)."""
    return _list(option, text, int, "whole numbers such as 4,16")


def row_limits(option: str, text: str) -> tuple[RowLimit, ...]:
    """`1,16,max` -> (1, 16, "auto")."""
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
