"""Runs the checks of `doctor` and shows their findings, a line each, with a fix if something is not right.

Checks run one after another, each in a thread with a time limit, because drivers, storage and clusters may hang. An
exception that a check raises becomes its finding.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from model.errors import TwoTowerError
from pipeline.core.text import one_line

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """A result of a check."""

    level: Level
    found: str
    fix: str = ""
    """The action that fixes the problem; empty if none is needed or if `found` names it."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check to run, with its time limit in seconds."""

    name: str
    look: Callable[[], Iterable[Finding]]
    seconds: float = 30.0
    advice: str = ""
    """The fix to show if `look` raises a TwoTowerError. It is needed if the text of the error does not name one."""


@dataclass(frozen=True, slots=True)
class Line:
    """A finding as it is shown to the user."""

    check: str
    level: Level
    found: str
    fix: str
    seconds: float
    """Seconds that the whole check took."""

    def text(self) -> str:
        """Return the line as text for people to read."""
        return f"{self.level:4}  {self.check:11} {self.found}" + (f"; fix: {self.fix}" if self.fix else "")


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warn(found: str, fix: str) -> Finding:
    return Finding("warn", found, fix)


def fail(found: str, fix: str = "") -> Finding:
    return Finding("FAIL", found, fix)


def examine(checks: Iterable[Check]) -> Iterator[Line]:
    """Run the checks and yield their lines as they come. This never raises and always ends, whatever the checks do."""
    for check in checks:
        started = time.monotonic()
        findings = _bounded(check)
        seconds = round(time.monotonic() - started, 3)
        for level, found, fix in findings:
            yield Line(check.name, level, one_line(found), one_line(fix), seconds)


def report(lines: Iterable[Line], show: Callable[[str], object], *, as_json: bool) -> bool:
    """Show each line as it comes, or all lines as one JSON object. Return True if no line is FAIL."""
    shown = []
    for line in lines:
        shown.append(line)
        if not as_json:
            show(line.text())
    well = all(line.level != "FAIL" for line in shown)
    if as_json:
        show(json.dumps({"ok": well, "checks": [asdict(line) for line in shown]}, indent=1))
    return well


def _bounded(check: Check) -> Sequence[Finding]:
    answers: queue.SimpleQueue[Sequence[Finding]] = queue.SimpleQueue()

    def look() -> None:
        try:
            answers.put(list(check.look()))
        except TwoTowerError as error:
            answers.put([fail(str(error), check.advice)])
        except BaseException as error:  # a driver or a library may raise anything
            answers.put(
                [
                    fail(
                        f"the check itself failed: {type(error).__name__}: {error}",
                        "if it is no fault of this machine, report it as a bug",
                    )
                ]
            )

    threading.Thread(target=look, name=f"doctor-{check.name}", daemon=True).start()
    try:
        return answers.get(timeout=check.seconds)
    except queue.Empty:
        return [
            fail(f"no answer within {check.seconds:g} s", "it hangs: look at the driver, storage or network behind")
        ]
