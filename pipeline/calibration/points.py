"""The points of a calibration: which settings are tried at which row limits, and in which order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides over the text of a row: the quality of a point is that of its setting, whatever its row limit."""

    mode: Literal["ar", "diffusion"]
    threshold: float | None = None
    """Confidence threshold; None in AR mode, as are the steps."""
    steps: int | None = None
    """Denoiser forwards a block at most."""

    @property
    def name(self) -> str:
        """Unique, and fit for a file name: ar, diffusion-g0.8-t16."""
        return self.mode if self.threshold is None else f"{self.mode}-g{self.threshold!r}-t{self.steps}"

    @property
    def label(self) -> str:
        """As a person reads it."""
        if self.threshold is None:
            return "AR"
        return f"threshold {self.threshold!r}, {self.steps} {'step' if self.steps == 1 else 'steps'}"


AR = Setting("ar")
"""What all others are compared with."""


@dataclass(frozen=True, slots=True)
class Point:
    """A setting at a row limit: what is measured, and what a job can be set to."""

    setting: Setting
    max_rows: int

    @property
    def name(self) -> str:
        """Unique: diffusion-g0.8-t16-r256."""
        return f"{self.setting.name}-r{self.max_rows}"

    @property
    def label(self) -> str:
        """As a person reads it."""
        return f"{self.setting.label}, {self.max_rows} {'row' if self.max_rows == 1 else 'rows'}"

    @property
    def care(self) -> tuple[bool, float, int, int]:
        """Larger for the point that takes fewer chances: AR, then a higher threshold, more steps, fewer rows."""
        setting = self.setting
        return setting.mode == "ar", setting.threshold or 0.0, setting.steps or 0, -self.max_rows


def order_points(
    thresholds: Iterable[float], steps: Iterable[int], row_limits: Iterable[int], own: Point
) -> tuple[Point, ...]:
    """All points of the grid and the job's own one, each once, in the order in which they are measured.

    First AR and the job's setting, at the largest row limit and at the job's own. Then from coarse to fine: the ends of
    each list before what lies between them, the most careful end first, so that whatever is there when the time is up
    spans the grid. At the largest row limit, where the quality of a setting is measured, it comes before the others.
    """
    limits = sorted({*row_limits, own.max_rows}, reverse=True)
    settings = {AR: 0, own.setting: 0}
    for threshold, threshold_level in _levels(sorted(set(thresholds), reverse=True)):
        for most, steps_level in _levels(sorted(set(steps), reverse=True)):
            settings.setdefault(Setting("diffusion", threshold, most), threshold_level + steps_level)
    first = [Point(setting, rows) for rows in (limits[0], own.max_rows) for setting in (AR, own.setting)]
    grid = [
        (level + 2 * rows_level, Point(setting, rows))  # a low limit is slow to measure, and seldom what is chosen
        for rows, rows_level in _levels(limits)
        for setting, level in settings.items()
    ]
    rest = [point for _, point in sorted(grid, key=lambda entry: entry[0])]  # stable: as listed among equals
    return tuple(dict.fromkeys([*first, *rest]))


def _levels(ordered: Sequence[T]) -> list[tuple[T, int]]:
    """Each value with how fine a grid has to be to hold it: 0 the first, 1 the last, then middles of what is left."""
    levels = dict.fromkeys(range(len(ordered)), 0)
    if len(ordered) > 1:
        levels[len(ordered) - 1] = 1
    gaps, level = [(0, len(ordered) - 1)], 2
    while gaps := [(low, high) for low, high in gaps if high - low > 1]:
        halves = [(low, (low + high) // 2, high) for low, high in gaps]
        levels |= {middle: level for _, middle, _ in halves}
        gaps = [gap for low, middle, high in halves for gap in ((low, middle), (middle, high))]
        level += 1
    return [(value, levels[index]) for index, value in enumerate(ordered)]
