"""Defines the points that a calibration measures (a setting at a row limit), and the order in which it measures
them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """The generation settings that a calibration varies and that decide the text of a row.

    The row limit does not change the text, so the quality of a point is that of its setting.
    """

    mode: Literal["ar", "diffusion"]
    threshold: float | None = None
    """Confidence threshold; None in AR mode."""
    steps: int | None = None
    """Maximum denoiser forwards per block; None in AR mode."""

    @property
    def name(self) -> str:
        """Return a unique name that can be part of a file name: `ar`, or `diffusion-g0.8-t16`."""
        return self.mode if self.threshold is None else f"{self.mode}-g{self.threshold!r}-t{self.steps}"

    @property
    def label(self) -> str:
        """Return the setting as readable text: `threshold 0.8, 16 steps`, or `AR`."""
        if self.threshold is None:
            return "AR"
        return f"threshold {self.threshold!r}, {self.steps} {'step' if self.steps == 1 else 'steps'}"


AR = Setting("ar")
"""The AR setting, with which all others are compared."""


@dataclass(frozen=True, slots=True)
class Point:
    """A setting together with a row limit: what a calibration measures, and what a job can run at."""

    setting: Setting
    max_rows: int
    """The row limit: the largest number of rows that are generated together."""

    @property
    def name(self) -> str:
        """Return a unique name for use in files: `ar-r256`, or `diffusion-g0.8-t16-r256`."""
        return f"{self.setting.name}-r{self.max_rows}"

    @property
    def label(self) -> str:
        """Return the point as readable text: `threshold 0.8, 16 steps, 256 rows`, or `AR, 256 rows`."""
        return f"{self.setting.label}, {self.max_rows} {'row' if self.max_rows == 1 else 'rows'}"

    @property
    def care(self) -> tuple[bool, float, int, int]:
        """Return a sort key that is larger for a more careful point: AR, then a higher threshold, more steps, fewer
        rows."""
        setting = self.setting
        return setting.mode == "ar", setting.threshold or 0.0, setting.steps or 0, -self.max_rows


def order_points(
    thresholds: Iterable[float], steps: Iterable[int], row_limits: Iterable[int], own: Point
) -> tuple[Point, ...]:
    """Return all points of the grid and the job's own point, each once, in the order in which they are measured.

    The grid is AR, the job's setting, and every threshold with every number of steps, each at every row limit and at
    that of `own`. AR and the job's setting come first, at the largest row limit and at the job's own. The other points
    go from coarse to fine: the ends of each list come before the values between them, and the most careful end comes
    first. So if the time is up early, the measured points still span the grid. Each setting comes first at the largest
    row limit, because its quality is measured there.
    """
    limits = sorted({*row_limits, own.max_rows}, reverse=True)
    settings = {AR: 0, own.setting: 0}
    for threshold, threshold_level in _levels(sorted(set(thresholds), reverse=True)):
        for most, steps_level in _levels(sorted(set(steps), reverse=True)):
            settings.setdefault(Setting("diffusion", threshold, most), threshold_level + steps_level)
    first = [Point(setting, rows) for rows in (limits[0], own.max_rows) for setting in (AR, own.setting)]
    grid = [
        (level + 2 * rows_level, Point(setting, rows))  # a low row limit is slow to measure and seldom chosen
        for rows, rows_level in _levels(limits)
        for setting, level in settings.items()
    ]
    rest = [point for _, point in sorted(grid, key=lambda entry: entry[0])]  # stable: equal levels keep their order
    return tuple(dict.fromkeys([*first, *rest]))


def _levels(ordered: Sequence[T]) -> list[tuple[T, int]]:
    """Return each value with its level: 0 for the first value, 1 for the last, 2 for the one in the middle, 3 for those
    in the middle of the two gaps that are left, and so on. Values of the lowest levels make the coarsest grid."""
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
