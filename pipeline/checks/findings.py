"""Runs the checks of `doctor` and shows each of their findings as a line, with a fix if something is not right.

Checks run one after another, each in a thread with a time limit, because GPU drivers, storage and clusters may hang. An
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
"""How good a finding is. Only FAIL makes `doctor` exit with code 1."""


class Finding(NamedTuple):
    """One result of a check; a check may have several."""

    level: Level
    found: str
    """The result of the check, as text for the user."""
    fix: str = ""
    """The action that fixes the problem; empty if none is needed or if `found` names it."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check of `doctor`: a function that looks at one thing, and how long it may take."""

    name: str
    look: Callable[[], Iterable[Finding]]
    """The function that makes the findings. An exception that it raises becomes a FAIL."""
    seconds: float = 30.0
    """Time limit; a check that takes longer is a FAIL."""
    advice: str = ""
    """The fix to show if `look` raises a TwoTowerError whose text does not name one."""


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
    """Return a finding that needs no action."""
    return Finding("ok", found)


def warn(found: str, fix: str) -> Finding:
    """Return a finding that may be a problem for some jobs."""
    return Finding("warn", found, fix)


def fail(found: str, fix: str = "") -> Finding:
    """Return a finding that makes `doctor` fail."""
    return Finding("FAIL", found, fix)


def examine(checks: Iterable[Check]) -> Iterator[Line]:
    """Run the checks and yield the lines of each as soon as it has ended.

    Whatever the checks do, this never raises, and it ends within their time limits.
    """
    for check in checks:
        started = time.monotonic()
        findings = _bounded(check)
        seconds = round(time.monotonic() - started, 3)
        for level, found, fix in findings:
            yield Line(check.name, level, one_line(found), one_line(fix), seconds)


def report(lines: Iterable[Line], show: Callable[[str], object], *, as_json: bool) -> bool:
    """Show each line as it comes, or at the end all lines as one JSON object. Return whether no line is FAIL."""
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
    """Return the findings of a check, or one FAIL if it raises or exceeds its time limit. After the time limit, its
    thread runs on."""
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
                        "if the machine is not the cause, report this as a bug",
                    )
                ]
            )

    threading.Thread(target=look, name=f"doctor-{check.name}", daemon=True).start()
    try:
        return answers.get(timeout=check.seconds)
    except queue.Empty:
        return [
            fail(f"no answer within {check.seconds:g} s", "it hangs: look at the driver, storage or network behind it")
        ]
