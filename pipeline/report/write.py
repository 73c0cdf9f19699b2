"""Writes the HTML report of a job, when the job ends or at any other time."""

import os
import posixpath

from pipeline.core.errors import OutputError, TwoTowerError
from pipeline.core.text import one_line
from pipeline.output.layout import JOB, REPORT
from pipeline.report.html import make_html
from pipeline.report.summary import read_report
from pipeline.storage.storage import Storage, split_url
from pipeline.storage.urls import is_local, safe_url


def write_report(output_path: str, to: str | None = None) -> str:
    """Write the HTML report of the job with this output, and return its path or URL without credentials.

    `to`: the path or URL of the file, or of a folder that exists or ends with `/` and gets a report.html; None means
    `_job/report.html` in the output. Raises OutputError if the output is not a job's output or `to` is empty,
    StorageError if the storage fails.
    """
    page = make_html(read_report(output_path))
    if to is None:
        Storage(output_path, anchor=JOB).write(REPORT, page)  # an output that was removed is not created anew
        return safe_url(f"{output_path.rstrip('/')}/{REPORT}")
    target = _target(to)
    storage, name = split_url(target)
    storage.write(name, page)
    return safe_url(target)


def _target(to: str) -> str:
    if not to.strip():  # from an unset shell variable; it would mean the current directory
        raise OutputError("--to is empty: name a file")
    path = os.path.abspath(os.path.expanduser(to)) if is_local(to) else to
    folder = to.endswith("/") or Storage(path).kind() == "folder"
    return f"{path.rstrip('/')}/{posixpath.basename(REPORT)}" if folder else path


def report_line(output_path: str) -> str:
    """Write the HTML report of a job that has just ended. Return its path or URL, or a line that says why it failed.

    Nothing is raised: the job is done, and the command `report` can write the page later.
    """
    try:
        return write_report(output_path)
    except TwoTowerError as error:
        return f"not written: {one_line(error)}"
    except Exception as error:  # a bug in the report must not make a complete job fail
        return f"not written: {type(error).__name__}: {one_line(error)}"
