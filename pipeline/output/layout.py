"""Defines the names of files in an output folder and checks that the folder can be written to.

The names are relative to the folder. Those of the job's own records begin with `_`.
"""

from contextlib import suppress

from pipeline.core.errors import OutputError, StorageError
from pipeline.storage.storage import Storage
from pipeline.storage.urls import cause, safe_url

PLAN, MANIFEST, SUCCESS = "_job/plan.json", "_job/manifest.json", "_SUCCESS"
REPORT = "_job/report.html"
LIVE = "_job/live.json"
"""The driver's latest report, which also shows that the driver is alive."""
OWN = (PLAN, MANIFEST, SUCCESS, REPORT, LIVE)
"""The job's own files that are not in one of its folders."""
RECORDS = "_job/units"
"""Folder of the commit records, one per unit."""
SEGMENTS = "_job/segments"
"""Folder of the segments, with one folder per unit: the finished rows of units that are not finished."""
DRIVERS = "_job/drivers"
"""Folder of the drivers' claims. The driver with the highest number owns the job."""
PARTS = "part-*.parquet"
PROBE = "_writable"
"""Name of the file that is written and removed to check whether the folder can be written to."""


def part_name(unit_id: str) -> str:
    """Return the file name of a unit's part."""
    return f"part-{unit_id}.parquet"


def record_name(unit_id: str) -> str:
    """Return the name of a unit's commit record."""
    return f"{RECORDS}/{unit_id}.json"


def check_writable(url: str) -> None:
    """Write an empty file `_writable` in the folder and remove it. Raises OutputError if the write fails."""
    try:
        storage = Storage(url)
        storage.write(PROBE, b"")
        with suppress(StorageError):  # credentials that may write but not delete are good enough for a job
            storage.remove(PROBE)
    except StorageError as error:
        why = cause(error.__cause__ or error)
        raise OutputError(f"cannot write to output {safe_url(url)}: {why}") from error
