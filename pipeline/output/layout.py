"""Defines the names of files in an output folder and checks that the folder can be written to.

The names are relative to the folder. All of them except those of parts begin with `_`.
"""

from contextlib import suppress

from pipeline.core.errors import OutputError, StorageError
from pipeline.storage.failures import cause
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

JOB = "_job"
"""The folder of everything but the parts and `_SUCCESS`. It exists as long as a run may write to the output."""
PLAN, MANIFEST, SUCCESS = "_job/plan.json", "_job/manifest.json", "_SUCCESS"
"""The plan, the manifest, and the empty file that marks the output as complete."""
REPORT = "_job/report.html"
LIVE = "_job/live.json"
"""The progress of the job, which the driver writes again and again. `status` shows it and sees from it
whether the driver is alive."""
SET_ASIDE = "_job/set_aside.json"
"""The rows that the last run could not read (pipeline.driver.set_aside). There is none without such rows."""
OWN = (PLAN, MANIFEST, SUCCESS, REPORT, LIVE, SET_ASIDE)
"""All files of a job that are neither a part nor in one of the folders below."""
RECORDS = "_job/units"
"""The folder of the commit records, one per published unit."""
SEGMENTS = "_job/segments"
"""The folder of the segments, with one folder per unit. They hold the finished rows of units that have no part yet."""
DRIVERS = "_job/drivers"
"""The folder of the drivers' claims. The driver with the highest number owns the job (pipeline.output.claim)."""
PARTS = "part-*.parquet"
"""The pattern that the names of all parts match."""
PROBE = "_writable"
"""The name of the file that is written and removed to check whether the folder can be written to."""


def part_name(unit_id: str) -> str:
    """Return the name of a unit's part, which lies directly in the output folder."""
    return f"part-{unit_id}.parquet"


def record_name(unit_id: str) -> str:
    """Return the name of a unit's commit record."""
    return f"{RECORDS}/{unit_id}.json"


def check_writable(url: str) -> None:
    """Write an empty file PROBE to the folder and remove it.

    Raises OutputError if the URL cannot be used or the write fails. A failure to remove the file is ignored.
    """
    try:
        storage = Storage(url)
        storage.write(PROBE, b"")
        with suppress(StorageError):  # credentials that may write but not delete are good enough for a job
            storage.remove(PROBE)
    except StorageError as error:
        why = cause(error.__cause__ or error)
        raise OutputError(f"cannot write to output {safe_url(url)}: {why}") from error
