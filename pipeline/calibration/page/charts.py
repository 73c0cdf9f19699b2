"""Draws the charts of a calibration as SVG elements for the report. Text stays text, and colours are the CSS variables
of the page.

matplotlib knows no CSS variables, so it draws in placeholder colours, which are then replaced in the SVG.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.calibration.choice import Choice, Result
from pipeline.calibration.points import AR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT, _GRID = "#010203", "#040506"
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(6))
_COLOURS = {_TEXT: "var(--text)", _GRID: "var(--line)"}
_COLOURS |= {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LABEL_PLACES = ((-14, -4), (-13, -11), (-13, 5), (0, -15), (15, 5), (0, 9), (17, -3))
"""Offsets of a label from its marker in points (1/72 inch). The first one that is free is used."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "twotower",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def quality_speed(choice: Choice) -> str:
    """Return a chart of agreement against tokens/s. A line for each row limit joins the points with the most steps;
    points with fewer steps are drawn without a line."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import PercentFormatter

        steps = sorted({r.point.setting.steps for r in choice.results if r.point.setting.steps}, reverse=True)
        for number, rows in enumerate(sorted({r.point.max_rows for r in choice.results}, reverse=True)):
            colour = _SERIES[number % len(_SERIES)]
            axes.plot([], [], color=colour, linewidth=3, label=f"{rows} {'row' if rows == 1 else 'rows'}")
            _draw_limit(axes, [r for r in choice.results if r.point.max_rows == rows], steps, colour)
        for number, most in enumerate(steps):
            style = _step_style(number)
            axes.plot(
                [], [], linestyle="none", color=_TEXT, label=f"{most} {'step' if most == 1 else 'steps'}", **style
            )
        axes.plot([], [], "*", color=_TEXT, markersize=9, label="AR")
        best = choice.best
        spot = best.speed.tokens_per_s, best.quality.agreement.mean
        axes.plot(*spot, "o", markersize=16, fillstyle="none", color=_TEXT, markeredgewidth=1.5)
        axes.axhline(choice.min_agreement, color=_TEXT, linestyle="--", linewidth=0.8, alpha=0.6)
        low = min([choice.min_agreement, *(result.quality.agreement.mean for result in choice.results)])
        axes.set_ylim(max(0.0, low - 0.15 * (1 - low) - 0.005), 1 + 0.1 * (1 - low) + 0.005)
        _speed_axis(axes, [result.speed.tokens_per_s for result in choice.results])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
        axes.set_ylabel("agreement with AR")
        labels = _Labels(axes)
        for result in sorted(choice.results, key=lambda r: (r is not best, -r.point.max_rows, r.point.care)):
            setting = result.point.setting
            if setting.threshold is not None and (setting.steps == steps[0] or result is best):
                labels.put((result.speed.tokens_per_s, result.quality.agreement.mean), f"{setting.threshold:g}")
        axes.figure.legend(loc="outside lower center", ncols=4)

    return _svg(draw, "quality", (5.7, 4.5))


def _draw_limit(axes: "Axes", results: Sequence[Result], steps: Sequence[int], colour: str) -> None:
    """Draw the points of one row limit."""
    for number, most in enumerate(steps):
        found = [result for result in results if result.point.setting.steps == most]
        found.sort(key=lambda result: result.point.setting.threshold or 0.0)
        x = [result.speed.tokens_per_s for result in found]
        y = [result.quality.agreement.mean for result in found]
        if number == 0:
            low = [result.quality.agreement.mean - result.quality.agreement.low for result in found]
            high = [result.quality.agreement.high - result.quality.agreement.mean for result in found]
            axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1, alpha=0.4, zorder=2)
        line = {"linewidth": 1.5} if number == 0 else {"linestyle": "none", "alpha": 0.8}
        axes.plot(x, y, color=colour, zorder=3, **line, **_step_style(number))
    for result in results:
        if result.point.setting == AR:
            axes.axvline(result.speed.tokens_per_s, color=colour, linestyle=":", linewidth=1.1, zorder=1)
            axes.plot(result.speed.tokens_per_s, 1, "*", color=colour, markersize=11, zorder=4)


def _step_style(number: int) -> dict[str, Any]:
    """Return the marker style of the points with the most steps (0), the second most (1), and so on."""
    filled = "full" if number == 0 else "none"
    return {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 5, "fillstyle": filled}


def by_threshold(choice: Choice, name: str, title: str, value: Callable[[Result], float | None]) -> str:
    """Return a chart of a measure against the threshold: a line for each number of steps, and a dashed one for AR."""

    def draw(axes: "Axes") -> None:
        settings = {result.point.setting: result for result in choice.results}
        steps = sorted({setting.steps for setting in settings if setting.steps is not None}, reverse=True)
        for number, most in enumerate(steps):
            here = {s.threshold or 0.0: value(r) for s, r in settings.items() if s.steps == most}
            found = sorted((threshold, y) for threshold, y in here.items() if y is not None)
            colour, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 1.6, "markersize": 5}
            axes.plot([x for x, _ in found], [y for _, y in found], label=f"{most} steps", **style)
        reference = value(settings[AR]) if AR in settings else None
        if reference is not None:
            axes.axhline(reference, color=_TEXT, linestyle="--", linewidth=0.9, label="AR")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("confidence threshold")
        axes.set_ylabel(title)
        axes.figure.legend(loc="outside lower center", ncols=4)

    return _svg(draw, name, (5.2, 3.6))


class _Labels:
    """The labels of a chart, placed beside their markers so that no two overlap."""

    def __init__(self, axes: "Axes") -> None:
        self._axes = axes
        self._taken: list[tuple[float, float]] = []  # centres of the labels, in points

    def put(self, where: tuple[float, float], text: str) -> None:
        """Write the text at the first place that is free, or not at all if no place is free."""
        pixels = self._axes.transData.transform(where)
        scale = 72 / self._axes.figure.dpi
        for dx, dy in _LABEL_PLACES:
            x, y = pixels[0] * scale + dx, pixels[1] * scale + dy
            if all(abs(x - other_x) > 22 or abs(y - other_y) > 9 for other_x, other_y in self._taken):
                self._taken.append((x, y))
                self._axes.annotate(text, where, (dx, dy), textcoords="offset points", ha="center", fontsize=8)
                return


def _speed_axis(axes: "Axes", speeds: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(filter(None, speeds), default=1.0), max(speeds, default=1.0)
    if high > 6 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, high * 1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("completion tokens/s of a replica")


def _svg(draw: Callable[["Axes"], None], name: str, size: tuple[float, float]) -> str:
    """Return the drawing as an <svg> element whose ids begin with `name`, so that a page can hold several charts."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's own matplotlibrc
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.6)
        draw(axes)
        text = _written(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{name}"', text, count=1)
    return re.sub("|".join(_COLOURS), lambda match: _COLOURS[match.group()], text)


def _written(figure: "Figure") -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()
