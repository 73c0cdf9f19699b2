"""Draws charts as SVG for the HTML pages of the report and of `calibrate`.

Text in a chart stays text. The classes of STYLE give all colours, so that a chart is light or dark as its page is.
"""

import math
from collections.abc import Iterable, Iterator
from html import escape

from pipeline.core.text import number

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 40
SMALL, LARGE, TALL = (360, 208), (560, 288), (560, 404)
"""Margins of a chart, and sizes of charts with the margins, in units of the SVG."""
SERIES = 6
"""Number of different colours for series: the classes s0 to s5."""
MARKS = (
    "m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "m-3.5,-3.5h7v7h-7z",  # square
    "m0,-4.5l4.5,8h-9z",  # triangle
    "m0,-5l4.5,5l-4.5,5l-4.5,-5z",  # diamond
    "m0,4.5l4.5,-8h-9z",  # triangle that stands on its tip
    "m-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",  # plus
)
"""Shapes of marks as SVG paths from their centre, as are STAR, RING and DASH."""
STAR = "m0,-7l1.7,4.7l5,0.1l-3.9,3.1l1.3,4.8l-4.1,-2.8l-4.1,2.8l1.3,-4.8l-3.9,-3.1l5,-0.1z"
RING = "m-10,0a10,10 0 1,0 20,0a10,10 0 1,0 -20,0z"
DASH = "m-7,0h14"
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of something drawn, in units of the SVG."""
Key = tuple[str, ...]
"""An entry of a legend: the CSS classes of its mark, its text, and the shape of its mark if that is not a square."""

STYLE = """
figure > svg { display: block; width: 100%; height: auto; max-width: 620px; overflow: visible; }
svg { --ink: var(--text); }
svg text { fill: var(--soft); font-size: 12px; }
svg .label { fill: var(--text); stroke: var(--page); stroke-width: 3px; paint-order: stroke; }
.s0 { --ink: var(--series-0); } .s1 { --ink: var(--series-1); } .s2 { --ink: var(--series-2); }
.s3 { --ink: var(--series-3); } .s4 { --ink: var(--series-4); } .s5 { --ink: var(--series-5); }
.fill { fill: var(--ink); }
.band { fill: var(--ink); fill-opacity: 0.25; }
.hollow { fill: var(--page); stroke: var(--ink); stroke-width: 1.3; }
.line, .rule, .grid { fill: none; stroke: var(--ink); stroke-width: 1.8; stroke-linejoin: round; }
.rule { stroke-width: 1.2; }
.grid { stroke: var(--line); stroke-width: 1; }
.dashed { stroke-dasharray: 5 4; }
.dotted { stroke-dasharray: 1.5 3; }
.faint { stroke-opacity: 0.4; }
.keys { margin: 4px 0; }
.key { display: inline-block; margin-right: 12px; }
.key svg { width: 14px; height: 14px; vertical-align: -2px; margin-right: 5px; }
@media (max-width: 600px) { svg.large text { font-size: 16px; } }
"""


class Scale:
    """The values along an axis, from `low` to `high`. `log`: equal ratios have equal lengths; `low` must be above 0."""

    def __init__(self, low: float, high: float, *, log: bool = False) -> None:
        self.low, self.high, self._log = low, high if high > low else low + 1, log

    def share(self, value: float) -> float:
        """Return the place of a value: 0 for `low` or less, 1 for `high` or more."""
        inside = min(max(value, self.low), self.high)
        if self._log:
            return math.log(inside / self.low) / math.log(self.high / self.low)
        return (inside - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> list[float]:
        """Return roughly `about` round numbers within the scale; if `log`, powers of ten and 2 and 5 times these."""
        if not self._log:
            return ticks(self.low, self.high, about)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
        factors = (1, 2, 5) if len(powers) < about else (1,)
        found = [factor * 10.0**power for power in powers for factor in factors]
        return [tick for tick in found if self.low <= tick <= self.high]


class Chart:
    """A chart: its two scales and the SVG elements drawn so far."""

    def __init__(self, size: tuple[int, int], x: Scale, y: Scale, about: str) -> None:
        """Start an empty chart. `about`: its description for readers who cannot see it."""
        self.width, self.height = size
        self._x, self._y, self._about = x, y, about
        self._made: list[str] = []
        self._taken: list[Box] = []  # by marks and labels

    def x(self, value: float) -> float:
        """Return the horizontal position of an x value, in units of the SVG."""
        return LEFT + self._x.share(value) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical position of a y value, in units of the SVG."""
        return self.height - BOTTOM - self._y.share(value) * (self.height - TOP - BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", css: str = "") -> None:
        """Add a text, which is escaped, at a position in units of the SVG."""
        self._made.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def bar(self, x0: float, x1: float, value: float, title: str) -> None:
        """Add a bar up to `value`, between two x values. A pointer that rests on the bar shows the title."""
        left, width, top = self.x(x0), max(0.5, self.x(x1) - self.x(x0) - 0.7), self.y(value)
        path = f"M{left:.1f},{top:.1f}h{width:.1f}V{self.height - BOTTOM}h-{width:.1f}z"
        self._made.append(f'<path class="s0 fill" d="{path}"><title>{escape(title)}</title></path>')

    def area(self, x: Iterable[float], low: Iterable[float], high: Iterable[float], css: str, title: str) -> None:
        """Add the filled area between two lines through the given values."""
        x = list(x)
        outline = self._points(zip(x, high, strict=True)) + self._points(zip(x, low, strict=True))[::-1]
        self._made.append(
            f'<polygon class="{css}" points="{" ".join(outline)}"><title>{escape(title)}</title></polygon>'
        )

    def path(self, points: Iterable[tuple[float, float]], css: str) -> None:
        """Add a line through points, each an x and a y value."""
        self._made.append(f'<polyline class="{css}" points="{" ".join(self._points(points))}"/>')

    def vertical(self, x: float, css: str) -> None:
        """Add a line from the bottom to the top at an x value."""
        self.path([(x, self._y.low), (x, self._y.high)], css)

    def horizontal(self, y: float, css: str) -> None:
        """Add a line from the left to the right at a y value."""
        self.path([(self._x.low, y), (self._x.high, y)], css)

    def mark(self, x: float, y: float, shape: str, css: str, title: str) -> None:
        """Add a mark at an x and a y value. A pointer that rests on the mark shows the title."""
        across, down = self.x(x), self.y(y)
        half = 11 if shape == RING else 4
        self._taken.append((across - half, down - half, across + half, down + half))
        path = f"M{across:.1f},{down:.1f}{shape}"
        self._made.append(f'<path class="{css}" d="{path}"><title>{escape(title)}</title></path>')

    def label(self, x: float, y: float, text: str, *, must: bool = False) -> None:
        """Write a text beside the mark at an x and a y value, once all marks are drawn.

        It covers no mark and no other label. If there is no such place, it is left out, or `must` be written anyway.
        """
        best = min(_boxes_beside(self.x(x), self.y(y), text), key=self._covered)
        if must or not self._covered(best):
            self._taken.append(best)
            self.text((best[0] + best[2]) / 2, best[3] - 3, text, css="label")

    def axes(self, x_label: str, y_label: str, *, whole: bool = False) -> None:
        """Add grid lines, ticks and labels for both axes. `whole`: x shows only whole numbers."""
        bottom = self.height - BOTTOM
        for tick in self._y.ticks(max(4, (bottom - TOP) // 36)):
            self.horizontal(tick, "grid")
            self.text(LEFT - 5, self.y(tick) + 4, number(tick), "end")
        self.horizontal(self._y.low, "grid")
        for tick in self._x.ticks(5):
            if not whole or tick == round(tick):
                self._made.append(f'<path class="grid" d="M{self.x(tick):.1f},{bottom}v4"/>')
                self.text(self.x(tick), bottom + 16, number(tick))
        self.text((LEFT + self.width - RIGHT) / 2, self.height - 4, x_label)
        self.text(0, 12, y_label, "start")

    def svg(self) -> str:
        """Return the chart as SVG text."""
        css, about = "small" if self.width == SMALL[0] else "large", escape(self._about)
        start = f'<svg class="{css}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{about}">'
        return f"{start}{''.join(self._made)}</svg>"

    def _points(self, values: Iterable[tuple[float, float]]) -> list[str]:
        return [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in values]

    def _covered(self, box: Box) -> int:
        """Return how many marks and labels the box would cover; one more if it is not inside the axes."""
        left, top, right, bottom = box
        outside = left < LEFT or right > self.width or top < TOP - 8 or bottom > self.height - BOTTOM
        return outside + sum(left < x1 and right > x0 and top < y1 and bottom > y0 for x0, y0, x1, y1 in self._taken)


def _boxes_beside(x: float, y: float, text: str) -> Iterator[Box]:
    """Yield boxes for a text around a position, the best first. The page enlarges texts on small screens to this."""
    width, height = 8.5 * len(text), 13
    for gap in (6, 14):
        for right, down in ((-1, 0), (1, 0), (-0.5, 1), (0.5, -1), (-0.5, -1), (0.5, 1)):
            left = x + right * (gap + width / 2) - width / 2
            top = y + down * (gap + height / 2) - height / 2
            yield left, top, left + width, top + height


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return roughly `about` round numbers between `low` and `high`."""
    raw = (high - low) / about
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
