"""Writes the report of a job, at its end or at any time."""

import os
import posixpath

from pipeline.core.errors import OutputError, TwoTowerError
from pipeline.output.layout import REPORT
from pipeline.report.html import make_html
from pipeline.report.summary import read_report
from pipeline.storage.storage import Storage, split_url
from pipeline.storage.urls import is_local, safe_url


def write_report(output_path: str, to: str | None = None) -> str:
    """Writes the page into the output folder, or to another path or URL, a file or a folder -> where, fit to be shown.

    Raises OutputError where the output is no job's or `to` is empty, StorageError.
    """
    target = f"{output_path.rstrip('/')}/{REPORT}" if to is None else _target(to)
    storage, name = split_url(target)
    storage.write(name, make_html(read_report(output_path)))
    return safe_url(target)


def _target(to: str) -> str:
    if not to.strip():  # an unset shell variable would mean the current directory
        raise OutputError("--to is empty: name a file")
    path = os.path.abspath(os.path.expanduser(to)) if is_local(to) else to
    folder = to.endswith("/") or Storage(path).kind() == "folder"
    return f"{path.rstrip('/')}/{posixpath.basename(REPORT)}" if folder else path


def report_line(output_path: str) -> str:
    """Writes the page of a job that just ended -> a line for the operator. It never fails: the job is done, and
    `report` can be run again."""
    try:
        return write_report(output_path)
    except TwoTowerError as error:
        return f"not written: {' '.join(str(error).split())}"
    except Exception as error:  # a fault of the report's own must not make a job that is complete a failed one
        return f"not written: {type(error).__name__}: {' '.join(str(error).split())}"
