"""Formats numbers, times, durations and foreign texts for people to read."""

import math
import unicodedata
from collections.abc import Iterable

_GAP = " … "
"""The mark for the characters that `visible` leaves out in the middle of a text."""
LINE_END = "⏎"
"""The character that `visible` shows for a line feed."""
_NAMED = {"\n": LINE_END, "\t": r"\t", "\r": r"\r", "\\": r"\\", LINE_END: r"\u23ce"}
_BLANK = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0),
            *(*range(0x180B, 0x1810), *range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)),
        ),
    )
)
"""Characters that Unicode counts as letters or marks although nothing of them is seen. The two variation selectors of
emoji, U+FE0E and U+FE0F, are not among them."""


def number(value: float | None) -> str:
    """Return the number as a short text, or "-" if it is None or not finite.

    The text has three significant digits, and k, M, G or T from 10,000 on: `12.3k`. Below 10,000, whole numbers are
    written in full, and other numbers from 100 on are rounded to a whole one: `1,235`. Numbers below 0.001 have an
    exponent: `1.2e-05`.
    """
    if value is None or not math.isfinite(value):
        return "-"
    rounded = abs(float(f"{value:.3g}")) if abs(value) >= 1e4 else abs(value)  # 999,999 is 1M, not 1000k
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if rounded >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def share(part: float, whole: float) -> str:
    """Return part / whole as a percentage with two decimals, or "-" if `whole` is 0.

    Only a share of exactly 0 becomes `0%`, and only one of exactly 1 becomes `100%`.
    """
    if not whole:
        return "-"
    found = part / whole
    if found in (0, 1):
        return f"{found:.0%}"
    return "<0.01%" if found < 0.0001 else ">99.99%" if found > 0.9999 else f"{found:.2%}"


def when(iso: str) -> str:
    """Return a time from a record (ISO 8601 in UTC) in a form for people to read: `2026-01-31 12:00:00 UTC`."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


class TimeScale:
    """The unit of a time axis that is `seconds` long: seconds, minutes, hours or days. `unit` is its name."""

    def __init__(self, seconds: float) -> None:
        """Choose minutes from 2 minutes on, hours from 2 hours on, days from 2 days on."""
        sizes = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))
        found = next(((size, unit) for least, size, unit in sizes if seconds >= least), (1, "seconds"))
        self._size, self.unit = found

    def of(self, seconds: float) -> float:
        """Return the seconds converted to this unit."""
        return seconds / self._size


def time_left(seconds: float | None) -> str:
    """Return an estimate of the seconds left in a form for people to read, or "?" if it is None, not finite or
    negative, as before the first rows and in a file that anybody may have written."""
    return "?" if seconds is None or seconds < 0 else duration(seconds)


def duration(seconds: float) -> str:
    """Return seconds in a form for people to read: 48s, 3m20s, 2h05m, 4d03h; "?" if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{small_unit}"
    return f"{whole}s"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def one_line(text: object) -> str:
    """Return the text of an object, such as an error, in one line: each run of white space becomes one blank."""
    return " ".join(str(text).split())


def shorten(text: str, chars: int) -> str:
    """Return the text if it has at most `chars` characters, else its first `chars` - 1 characters and an ellipsis."""
    return text if len(text) <= chars else text[: chars - 1] + "…"


def printable(text: str) -> str:
    """Return the text with ? for each character that is not printable, such as a control character or a line break.

    It is for texts from files that anybody may have written: a terminal would obey control characters in them.
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def visible(text: str, chars: int | None = None) -> str:
    """Return the text on one line, safe for a terminal, with everything in it visible.

    A line feed becomes ⏎. All other control characters, bidi controls, zero-width characters, lone surrogates, and
    private or unassigned characters become escapes as in Python: `\\t`, `\\r`, `\\x1b`, `\\u202e`. A backslash of the
    text is doubled, and a ⏎ of the text becomes `\\u23ce`, so different texts have different results. A blank at the
    end of the text becomes `\\x20`: nobody would see it, but a model goes on differently after it. Combining marks and
    the blanks of other widths, such as U+00A0, stay.

    A result longer than `chars` characters (at least 5; None: no limit) is shortened to at most so many: a part at the
    beginning and one of about the same length at the end stay, with ` … ` between them. No escape is cut. Then the
    time does not depend on the length of the text. Raises ValueError if `chars` is below 5.
    """
    if chars is None:
        return _whole(text)
    if chars < len(_GAP) + 2:
        raise ValueError(f"{chars} characters are too few for a beginning, a gap and an end")
    # A character becomes at least one, so a text with more than `chars` characters is certainly too long.
    if len(text) <= chars and len(whole := _whole(text)) <= chars:
        return whole
    room = chars - len(_GAP)
    last = room // 2
    begin = _fitting(map(_visible, text[: room - last]), room - last)
    end = _fitting(reversed(_pieces(text[-last:])), last)
    return f"{''.join(begin)}{_GAP}{''.join(reversed(end))}"


def _whole(text: str) -> str:
    return "".join(_pieces(text))


def _pieces(end: str) -> list[str]:
    """Return the visible form of each character at the end of a text."""
    pieces = [_visible(character) for character in end]
    return [*pieces[:-1], r"\x20"] if end.endswith(" ") else pieces


def _fitting(pieces: Iterable[str], chars: int) -> list[str]:
    """Return as many of the first pieces as have at most `chars` characters together."""
    found = []
    for piece in pieces:
        found.append(piece)
        chars -= len(found[-1])
        if chars < 0:
            return found[:-1]
    return found


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character not in _BLANK and (character.isprintable() or unicodedata.category(character) == "Zs"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
