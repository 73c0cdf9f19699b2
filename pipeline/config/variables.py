"""Fills in the variables in the texts of a job file: `${NAME}`, `${NAME:-default}`, and `${DATE}`, which is a day."""

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta

from pipeline.config.messages import MAX_VALUE_CHARS, shown
from pipeline.config.secret_names import names_secret
from pipeline.core.errors import JobError
from pipeline.core.text import shorten

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}|\$\{")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_USER_INFO = re.compile(r"(?:https?|ftps?|sftp)://[^/]*@", re.IGNORECASE)
"""The part of a URL in which a user and a password may stand."""
DATE = "DATE"
"""The name of the variable whose value is a day: YYYY-MM-DD, or one of the words in DAYS_AGO."""
DAYS_AGO = {"today": 0, "yesterday": 1}
"""The words that DATE may be instead of a day -> the number of days before today (in UTC)."""


def utc_today() -> date:
    """Return today's date in UTC, which is the same on every machine of a cluster."""
    return datetime.now(UTC).date()


class Variables:
    """The values for the variables of one job file, which is filled in with one object of this class.

    All its texts see the same `today`, also if midnight passes, and a file in which DATE is two days is refused.
    """

    def __init__(self, values: Mapping[str, str], today: date) -> None:
        self._values, self._today = values, today
        self._day: tuple[str, str] | None = None  # the first value of DATE, and the place in the job file that used it

    def fill(self, text: str, where: str, *, is_path: bool = False) -> str:
        """Return the text with its variables filled in; `$${` stands for a literal `${`.

        In a path, a value loses its final slash if a slash follows. `s3://bucket/in/` and `s3://bucket/in` therefore
        mean the same in `${INPUT}/2026`; for an object store `in//2026` would be a different folder. Raises JobError,
        with a message that begins with `where`, if a variable is malformed or not set and without a default, if DATE is
        no day or a second day, or if the name of a variable looks like that of a secret. All settings are written to
        the output; only the user info of a URL of http, ftp or sftp is left out where paths are shown.
        """
        user_info = _USER_INFO.match(text) if is_path else None

        def fill_one(match: re.Match[str]) -> str:
            if match.group() == "$${":
                return "${"
            name = (match.group(1) or "").partition(":-")[0]
            if names_secret(name) and (user_info is None or match.end() > user_info.end()):
                raise JobError(
                    f"{where}: the variable {name} looks like a secret, and every setting is written to plan.json, "
                    "manifest.json and the report: leave it in the environment, where the libraries find it, or give "
                    "the variable another name"
                )
            value = self._value(match, where)
            return value.removesuffix("/") if is_path and text.startswith("/", match.end()) else value

        return _VARIABLE.sub(fill_one, text)

    def _value(self, match: re.Match[str], where: str) -> str:
        inner, text = match.group(1), match.string
        if inner is None:
            raise JobError(f"{where} is {shown(text)}: ${{ without }}: close it, or write $${{ for the characters")
        if "${" in inner:
            raise JobError(f"{where} is {shown(text)}: a variable inside a variable: write one ${{NAME:-default}}")
        name, has_default, default = inner.partition(":-")
        if not _NAME.fullmatch(name):
            raise JobError(
                f"{where}: ${{{shorten(inner, MAX_VALUE_CHARS)}}} is no variable: write ${{NAME}} or ${{NAME:-default}}"
            )
        value = self._values.get(name)
        if has_default:
            value = value or default
        elif value is None:
            raise JobError(f"{where}: the environment variable {name} is not set: set it or write ${{{name}:-default}}")
        return self._one_day(value, where) if name == DATE else value

    def _one_day(self, value: str, where: str) -> str:
        day = day_of(value, self._today)
        if day is None:
            words = " or ".join(DAYS_AGO)
            raise JobError(f"{where}: {DATE} is {shown(value)}: give a day as YYYY-MM-DD, or {words} (in UTC)")
        first, place = self._day = self._day or (day, where)
        if day != first:
            raise JobError(f"{where}: {DATE} is {day}, and {first} in {place}: write the same default in both")
        return day


def day_of(text: str, today: date) -> str | None:
    """Return the day, as YYYY-MM-DD, that the text means: itself, or a word of DAYS_AGO counted from `today`.

    Returns None if it is neither, or a day that does not exist.
    """
    if text in DAYS_AGO:
        return (today - timedelta(days=DAYS_AGO[text])).isoformat()
    try:  # fromisoformat also accepts other spellings, but each of them would name a different folder
        return date.fromisoformat(text).isoformat() if _DAY.fullmatch(text) else None
    except ValueError:  # a day that does not exist, such as 2026-02-30
        return None
