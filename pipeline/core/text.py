"""Formats numbers, times, durations and foreign texts for people to read."""

import math


def number(value: float | None) -> str:
    """Return the number as a short text, or "-" if it is None or not finite.

    It has three significant digits, and k, M, G or T from 10,000 on. Below 10,000, whole numbers are written in full
    and numbers from 100 on are rounded to a whole one.
    """
    if value is None or not math.isfinite(value):
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def share(part: float, whole: float) -> str:
    """Return a percentage, or "-" if `whole` is 0. Only a share of exactly 0 is shown as 0%, only exactly 1 as 100%."""
    if not whole:
        return "-"
    found = part / whole
    if found in (0, 1):
        return f"{found:.0%}"
    return "<0.01%" if found < 0.0001 else ">99.99%" if found > 0.9999 else f"{found:.2%}"


def when(iso: str) -> str:
    """Return a time from a record (ISO 8601 in UTC) in a form for people to read."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


class TimeScale:
    """The unit for showing a span of so many seconds: seconds, minutes, hours or days."""

    def __init__(self, seconds: float) -> None:
        sizes = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))
        found = next(((size, unit) for least, size, unit in sizes if seconds >= least), (1, "seconds"))
        self._size, self.unit = found

    def of(self, seconds: float) -> float:
        """Return the seconds converted to this unit."""
        return seconds / self._size


def duration(seconds: float) -> str:
    """Return seconds in a form for people to read: 48s, 3m20s, 2h05m, 4d03h."""
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{small_unit}"
    return f"{whole}s"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def one_line(text: object) -> str:
    """Return the text, or the text of an error, with each run of white space as one blank."""
    return " ".join(str(text).split())


def shorten(text: str, chars: int) -> str:
    """Return the text, cut off with an ellipsis if it has more than `chars` characters."""
    return text if len(text) <= chars else text[: chars - 1] + "…"


def printable(text: str) -> str:
    """Return the text with control characters replaced, for a terminal: anybody may have written what is read."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
