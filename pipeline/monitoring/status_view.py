"""Prints the status of a job once, or repeatedly until the job ends (`status OUTPUT --watch`)."""

import json
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.monitoring.status import JobStatus, lines, look_again, read_job


def show(
    output_path: str,
    *,
    watch: bool = False,
    every_s: float = 5.0,
    as_json: bool = False,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
    waiting: Callable[[], None] = lambda: None,
) -> bool:
    """Print the status once; with `watch`, every `every_s` seconds until the job is complete, stopped or dead.

    With `watch` on a terminal, text is updated in place; otherwise each status is printed below the last one.
    `waiting` is called before a wait of some seconds for a driver on another machine (see read_job). Return whether the
    job is complete; without `watch` always True. Raises OutputError if the folder is not a job's
    output, StorageError if the storage fails.
    """
    console = console or Console(soft_wrap=True, markup=False, highlight=False)
    now = read_job(output_path, sleep=sleep, waiting=waiting)
    if not watch:
        _print(console, now, as_json)
        return True
    looks = _looks(output_path, now, every_s, sleep)
    if console.is_terminal and not as_json:
        with Live(console=console, auto_refresh=False, transient=True) as screen:
            for now in looks:
                screen.update(Text("\n".join(lines(now))), refresh=True)
        _print(console, now, as_json)
    else:
        for now in looks:
            _print(console, now, as_json)
    return now.state == "complete"


def _looks(output_path: str, status: JobStatus, every_s: float, sleep: Callable[[float], None]) -> Iterator[JobStatus]:
    yield status
    while status.state in ("running", "unknown"):
        sleep(every_s)
        status = look_again(output_path, status)
        yield status


def _print(console: Console, status: JobStatus, as_json: bool) -> None:
    text = json.dumps(status.to_dict(), default=str) if as_json else "\n".join(lines(status))
    print(text, file=console.file, flush=True)
