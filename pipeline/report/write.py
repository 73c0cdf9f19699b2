"""Writes the HTML report of a job, when the job ends or at any other time."""

import os
import posixpath

from pipeline.core.errors import OutputError, TwoTowerError
from pipeline.output.layout import REPORT
from pipeline.report.html import make_html
from pipeline.report.summary import read_report
from pipeline.storage.storage import Storage, split_url
from pipeline.storage.urls import is_local, safe_url


def write_report(output_path: str, to: str | None = None) -> str:
    """Write the page and return its path or URL without credentials.

    The page goes into the output folder, or to `to`: the path or URL of a file or folder. Raises OutputError if
    the output is not a job's output or `to` is empty, StorageError if the storage fails.
    """
    target = f"{output_path.rstrip('/')}/{REPORT}" if to is None else _target(to)
    storage, name = split_url(target)
    storage.write(name, make_html(read_report(output_path)))
    return safe_url(target)


def _target(to: str) -> str:
    if not to.strip():  # an unset shell variable would else mean the current directory
        raise OutputError("--to is empty: name a file")
    path = os.path.abspath(os.path.expanduser(to)) if is_local(to) else to
    folder = to.endswith("/") or Storage(path).kind() == "folder"
    return f"{path.rstrip('/')}/{posixpath.basename(REPORT)}" if folder else path


def report_line(output_path: str) -> str:
    """Write the page of a job that has just ended, and return a line for the operator.

    If writing fails, the line says why and nothing is raised: the job is done, and `report` can be run again.
    """
    try:
        return write_report(output_path)
    except TwoTowerError as error:
        return f"not written: {' '.join(str(error).split())}"
    except Exception as error:  # a bug in the report must not make a complete job fail
        return f"not written: {type(error).__name__}: {' '.join(str(error).split())}"
