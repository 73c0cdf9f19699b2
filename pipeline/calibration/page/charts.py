"""Draws the charts of the report of a calibration as SVG, each with its legend."""

from collections.abc import Callable, Iterable, Sequence

from pipeline.calibration.choice import Choice, Result
from pipeline.calibration.points import AR, Setting
from pipeline.calibration.quality import Quality, percent
from pipeline.core.text import counted, number
from pipeline.pages.chart import DASH, LARGE, MARKS, RING, SERIES, STAR, TALL, Chart, Key, Scale


def quality_speed(choice: Choice) -> tuple[str, list[Key]]:
    """Return a chart of agreement against tokens/s for all measured points, and its legend.

    Each row limit has a colour and a line that joins its points with the most steps; points with fewer steps have marks
    only. The chosen point has a ring.
    """
    results, best = choice.results, choice.best
    worst = 100 * min([choice.min_agreement, *(result.quality.agreement.mean for result in results)])
    y = Scale(max(0.0, worst - 0.15 * (100 - worst) - 0.5), 100)
    chart = Chart(TALL, _speeds([result.speed.tokens_per_s for result in results]), y, "agreement against tokens/s")
    chart.axes("completion tokens/s of a replica", "agreement with AR (%)")
    chart.horizontal(100 * choice.min_agreement, "rule dashed")
    steps = _steps(result.point.setting for result in results)
    limits = sorted({result.point.max_rows for result in results}, reverse=True)
    for index, rows in enumerate(limits):
        here = [result for result in results if result.point.max_rows == rows]
        _draw_limit(chart, here, steps, f"s{index % SERIES}")
    chart.mark(*_place(best), RING, "rule", _about(best))
    chart.label(*_place(best), f"chosen: {_threshold(best)}", must=True)
    for result in sorted(results, key=lambda r: (-r.point.max_rows, r.point.care)):
        if result is not best and result.point.setting.steps in steps[:1]:
            chart.label(*_place(result), _threshold(result))
    return chart.svg(), [
        *((f"s{index % SERIES} fill", counted(rows, "row")) for index, rows in enumerate(limits)),
        *((_filled(index), counted(most, "step"), MARKS[index % len(MARKS)]) for index, most in enumerate(steps)),
        ("fill", "AR", STAR),
        ("rule dashed", f"smallest agreement allowed, {percent(choice.min_agreement)}", DASH),
    ]


def _draw_limit(chart: Chart, results: Sequence[Result], steps: Sequence[int], series: str) -> None:
    """Draw the points of one row limit.

    `steps`: all numbers of steps, the largest first. `series`: the CSS class that gives the colour.
    """
    joined = sorted(
        (result for result in results if result.point.setting.steps in steps[:1]),
        key=lambda result: result.point.setting.threshold or 0.0,
    )
    for result in joined:
        speed, agreement = result.speed.tokens_per_s, result.quality.agreement
        chart.path([(speed, 100 * agreement.low), (speed, 100 * agreement.high)], f"{series} rule faint")
    chart.path(map(_place, joined), f"{series} line")
    for result in results:
        if result.point.setting == AR:
            chart.vertical(result.speed.tokens_per_s, f"{series} rule dotted")
            chart.mark(*_place(result), STAR, f"{series} fill", _about(result))
        else:
            index = steps.index(result.point.setting.steps or 0)
            chart.mark(*_place(result), MARKS[index % len(MARKS)], f"{series} {_filled(index)}", _about(result))


def _place(result: Result) -> tuple[float, float]:
    """Return the place of a result in the chart: (tokens/s, agreement in percent)."""
    return result.speed.tokens_per_s, 100 * result.quality.agreement.mean


def _about(result: Result) -> str:
    return f"{result.point.label}: {number(result.speed.tokens_per_s)} tokens/s, agreement {result.quality.agreement}"


def _threshold(result: Result) -> str:
    threshold = result.point.setting.threshold
    return "AR" if threshold is None else f"{threshold:g}"


def _filled(index: int) -> str:
    """Return the CSS class for marks of a number of steps by its index: 0 for the most steps, 1 for the second most."""
    return "hollow" if index else "fill"


def _steps(settings: Iterable[Setting]) -> list[int]:
    """Return the different numbers of steps of the settings, the largest first. AR has none."""
    return sorted({setting.steps for setting in settings if setting.steps is not None}, reverse=True)


def _speeds(speeds: Sequence[float]) -> Scale:
    """Return the scale for tokens/s: linear from 0, or logarithmic if the speeds differ by a factor of more than 6."""
    low, high = min(filter(None, speeds), default=1.0), max(speeds)
    return Scale(low / 1.3, high * 1.3, log=True) if high > 6 * low else Scale(0, high * 1.1)


def by_threshold(choice: Choice, title: str, value: Callable[[Quality], float | None]) -> tuple[str, list[Key]]:
    """Return a chart of a measure against the confidence threshold, and its legend.

    There is a line for each number of steps, and a dashed one for AR if AR has the measure. `title`: the name of the
    measure. `value`: returns the measure of a setting, or None if the setting has none. At least one result must be of
    diffusion.
    """
    values = {result.point.setting: value(result.quality) for result in choice.results}
    thresholds = [setting.threshold for setting in values if setting.threshold is not None]
    room = 0.05 * (max(thresholds) - min(thresholds)) or 0.05
    most = max((y for y in values.values() if y is not None), default=0.0)
    x = Scale(min(thresholds) - room, max(thresholds) + room)
    chart = Chart(LARGE, x, Scale(0, 1.08 * most), f"{title} against the threshold")
    chart.axes("confidence threshold", title)
    keys: list[Key] = []
    for index, steps in enumerate(_steps(values)):
        series, shape = f"s{index % SERIES}", MARKS[index % len(MARKS)]
        here = {setting: y for setting, y in values.items() if setting.steps == steps and y is not None}
        chart.path(sorted((setting.threshold or 0.0, y) for setting, y in here.items()), f"{series} line")
        for setting, y in here.items():
            chart.mark(setting.threshold or 0.0, y, shape, f"{series} fill", f"{setting.label}: {number(y)}")
        keys.append((f"{series} fill", counted(steps, "step"), shape))
    if (reference := values.get(AR)) is not None:
        chart.horizontal(reference, "rule dashed")
        keys.append(("rule dashed", "AR", DASH))
    return chart.svg(), keys
