"""What `doctor` finds, and how it looks: a check gives findings, a line each, with what to do where one is not right.

Checks come one after the other, each in a thread with a time limit, because drivers, storage and clusters may hang;
what a check raises is its finding.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from model.errors import TwoTowerError

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """One thing that a check found."""

    level: Level
    found: str
    fix: str = ""
    """What to do; empty where nothing is to be done, or `found` says it."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at, for so many seconds at most."""

    name: str
    look: Callable[[], Iterable[Finding]]
    seconds: float = 30.0
    advice: str = ""
    """What to do about an error of the project's own that `look` raises, where its text does not say."""


@dataclass(frozen=True, slots=True)
class Line:
    """A finding as it is shown."""

    check: str
    level: Level
    found: str
    fix: str
    seconds: float
    """What the whole check took."""

    def text(self) -> str:
        """For people."""
        return f"{self.level:4}  {self.check:11} {self.found}" + (f"; fix: {self.fix}" if self.fix else "")


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warn(found: str, fix: str) -> Finding:
    return Finding("warn", found, fix)


def fail(found: str, fix: str = "") -> Finding:
    return Finding("FAIL", found, fix)


def examine(checks: Iterable[Check]) -> Iterator[Line]:
    """The lines of the checks, as they come. Raises nothing and ends, whatever the checks do."""
    for check in checks:
        started = time.monotonic()
        findings = _bounded(check)
        seconds = round(time.monotonic() - started, 3)
        for level, found, fix in findings:
            yield Line(check.name, level, " ".join(found.split()), " ".join(fix.split()), seconds)


def report(lines: Iterable[Line], show: Callable[[str], object], *, as_json: bool) -> bool:
    """Shows the lines, each as it comes or all as one JSON object -> whether none of them is FAIL."""
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
