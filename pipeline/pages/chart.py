"""Draws charts as SVG for the HTML pages of the report and of `calibrate`.

Text in a chart is SVG text, which readers can select and search. All colours come from the CSS classes in STYLE, so
that a chart is light or dark as its page is.
"""

import math
from collections.abc import Iterable, Iterator
from html import escape

from pipeline.core.text import number

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 40
SMALL, LARGE, TALL = (360, 208), (560, 288), (560, 404)
"""Margins of a chart, and the sizes (width, height) of charts, margins included. All are in units of the SVG."""
SERIES = 6
"""Number of colours for series of a chart: the CSS classes s0 to s5."""
MARKS = (
    "m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "m-3.5,-3.5h7v7h-7z",  # square
    "m0,-4.5l4.5,8h-9z",  # triangle
    "m0,-5l4.5,5l-4.5,5l-4.5,-5z",  # diamond
    "m0,4.5l4.5,-8h-9z",  # triangle that stands on its tip
    "m-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",  # plus
)
"""Shapes of the marks of series: SVG path data relative to the centre of the mark. STAR, RING and DASH are such shapes,
too."""
STAR = "m0,-7l1.7,4.7l5,0.1l-3.9,3.1l1.3,4.8l-4.1,-2.8l-4.1,2.8l1.3,-4.8l-3.9,-3.1l5,-0.1z"
RING = "m-10,0a10,10 0 1,0 20,0a10,10 0 1,0 -20,0z"
DASH = "m-7,0h14"
Box = tuple[float, float, float, float]
"""A rectangle (left, top, right, bottom) in units of the SVG; y grows downwards."""
Key = tuple[str, ...]
"""An entry of a legend: (CSS classes of its mark, text) for a square mark, else (CSS classes, text, shape)."""

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
    """The scale of an axis: maps the values from `low` to `high` to places from 0 to 1.

    It is linear, or logarithmic if `log`; `low` must be above 0 then. A `high` that is not above `low` becomes
    `low` + 1.
    """

    def __init__(self, low: float, high: float, *, log: bool = False) -> None:
        self.low, self.high, self._log = low, high if high > low else low + 1, log

    def share(self, value: float) -> float:
        """Return the place of a value on the axis: 0 for `low` or less, 1 for `high` or more."""
        inside = min(max(value, self.low), self.high)
        if self._log:
            return math.log(inside / self.low) / math.log(self.high / self.low)
        return (inside - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> list[float]:
        """Return roughly `about` round numbers within the scale.

        If the scale is logarithmic, these are the powers of ten, and 2 and 5 times these if the powers alone are few.
        A logarithmic scale that has not even two of them gets the numbers of a linear one.
        """
        if not self._log:
            return ticks(self.low, self.high, about)
        powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(powers) < about else (1,)
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [tick for tick in found if self.low <= tick <= self.high]
        return found if len(found) > 1 else ticks(self.low, self.high, about)


class Chart:
    """A chart under construction: its two scales and the SVG elements drawn so far.

    Methods place what they draw by values on the scales, except `text`. Later elements cover earlier ones.
    """

    def __init__(self, size: tuple[int, int], x: Scale, y: Scale, about: str) -> None:
        """Start an empty chart of (width, height) `size`. `about`: its description for readers who cannot see it."""
        self.width, self.height = size
        self._x, self._y, self._about = x, y, about
        self._made: list[str] = []
        self._taken: list[Box] = []  # the places of marks and labels, which a new label must not cover

    def x(self, value: float) -> float:
        """Return the horizontal position of an x value in units of the SVG; one outside the scale goes to its end."""
        return LEFT + self._x.share(value) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical position of a y value in units of the SVG; one outside the scale goes to its end."""
        return self.height - BOTTOM - self._y.share(value) * (self.height - TOP - BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", css: str = "") -> None:
        """Add a text at a position in units of the SVG; the text is escaped here.

        `anchor` is SVG's `text-anchor`: the point of the text (start, middle or end) that is at `x`.
        """
        self._made.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def bar(self, x0: float, x1: float, value: float, title: str) -> None:
        """Add a bar from the bottom up to `value`, between two x values. A pointer that rests on it shows the title."""
        left, width, top = self.x(x0), max(0.5, self.x(x1) - self.x(x0) - 0.7), self.y(value)
        path = f"M{left:.1f},{top:.1f}h{width:.1f}V{self.height - BOTTOM}h-{width:.1f}z"
        self._made.append(f'<path class="s0 fill" d="{path}"><title>{escape(title)}</title></path>')

    def area(self, x: Iterable[float], low: Iterable[float], high: Iterable[float], css: str, title: str) -> None:
        """Add the filled area between the lines (x, low) and (x, high). A pointer that rests on it shows the title."""
        x = list(x)
        outline = self._points(zip(x, high, strict=True)) + self._points(zip(x, low, strict=True))[::-1]
        self._made.append(
            f'<polygon class="{css}" points="{" ".join(outline)}"><title>{escape(title)}</title></polygon>'
        )

    def path(self, points: Iterable[tuple[float, float]], css: str) -> None:
        """Add a line through points, each an (x, y) pair of values. `css`: its CSS classes."""
        self._made.append(f'<polyline class="{css}" points="{" ".join(self._points(points))}"/>')

    def vertical(self, x: float, css: str) -> None:
        """Add a line from the bottom to the top of the axes at an x value."""
        self.path([(x, self._y.low), (x, self._y.high)], css)

    def horizontal(self, y: float, css: str) -> None:
        """Add a line from the left to the right end of the axes at a y value."""
        self.path([(self._x.low, y), (self._x.high, y)], css)

    def mark(self, x: float, y: float, shape: str, css: str, title: str) -> None:
        """Add a mark at (x, y), of a shape such as those in MARKS. A pointer that rests on it shows the title."""
        across, down = self.x(x), self.y(y)
        half = 11 if shape == RING else 4
        self._taken.append((across - half, down - half, across + half, down + half))
        path = f"M{across:.1f},{down:.1f}{shape}"
        self._made.append(f'<path class="{css}" d="{path}"><title>{escape(title)}</title></path>')

    def label(self, x: float, y: float, text: str, *, must: bool = False) -> None:
        """Add a text beside the mark at (x, y). Call this after all marks are drawn.

        The text covers no mark and no earlier label. If there is no such place, the text is left out; if `must`, it is
        written at the place at which it covers the fewest.
        """
        best = min(_boxes_beside(self.x(x), self.y(y), text), key=self._covered)
        if must or not self._covered(best):
            self._taken.append(best)
            self.text((best[0] + best[2]) / 2, best[3] - 3, text, css="label")

    def axes(self, x_label: str, y_label: str, *, whole: bool = False) -> None:
        """Add the grid lines, ticks and labels of both axes. If `whole`, the x axis has ticks at whole numbers only."""
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
        """Return the chart as an `svg` element for a page that includes STYLE."""
        css, about = "small" if self.width == SMALL[0] else "large", escape(self._about)
        start = f'<svg class="{css}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{about}">'
        return f"{start}{''.join(self._made)}</svg>"

    def _points(self, values: Iterable[tuple[float, float]]) -> list[str]:
        return [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in values]

    def _covered(self, box: Box) -> int:
        """Return the number of marks and labels that the box would cover; one more if it is not inside the axes."""
        left, top, right, bottom = box
        outside = left < LEFT or right > self.width or top < TOP - 8 or bottom > self.height - BOTTOM
        return outside + sum(left < x1 and right > x0 and top < y1 and bottom > y0 for x0, y0, x1, y1 in self._taken)


def _boxes_beside(x: float, y: float, text: str) -> Iterator[Box]:
    """Yield boxes in which a text could stand beside a position in units of the SVG, the preferred box first.

    A box has room for the text at the larger size that it has on small screens.
    """
    width, height = 8.5 * len(text), 13
    for gap in (6, 14):
        for right, down in ((-1, 0), (1, 0), (-0.5, 1), (0.5, -1), (-0.5, -1), (0.5, 1)):
            left = x + right * (gap + width / 2) - width / 2
            top = y + down * (gap + height / 2) - height / 2
            yield left, top, left + width, top + height


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return roughly `about` round numbers from `low` to `high`, evenly spaced by 1, 2 or 5 times a power of ten.

    The list may be empty if `about` is 1 or 2, because the step may then be longer than the range. If `high` is not
    above `low`, or the range is not finite, return `low` alone.
    """
    raw = (high - low) / about
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
