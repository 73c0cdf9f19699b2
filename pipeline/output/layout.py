"""Names in an output folder, relative to it (those of the job's own records begin with _), and whether it can be
written to."""

from contextlib import suppress

from pipeline.core.errors import OutputError, StorageError
from pipeline.storage.storage import Storage
from pipeline.storage.urls import cause, safe_url

PLAN, MANIFEST, SUCCESS = "_job/plan.json", "_job/manifest.json", "_SUCCESS"
REPORT = "_job/report.html"
LIVE = "_job/live.json"
"""What the driver did last, and that it is alive."""
OWN = (PLAN, MANIFEST, SUCCESS, REPORT, LIVE)
"""The job's own files that stand alone."""
RECORDS = "_job/units"
"""Commit records, one a unit."""
SEGMENTS = "_job/segments"
"""A folder a unit: the rows that are finished while the unit is not."""
DRIVERS = "_job/drivers"
"""Who runs the job: the highest number has it."""
PARTS = "part-*.parquet"
PROBE = "_writable"
"""Written and removed, to see whether the folder can be written to."""


def part_name(unit_id: str) -> str:
    """The file name of a unit's part."""
    return f"part-{unit_id}.parquet"


def record_name(unit_id: str) -> str:
    """The name of a unit's commit record."""
    return f"{RECORDS}/{unit_id}.json"


def check_writable(url: str) -> None:
    """Writes an empty file `_writable` in the folder and removes it. Raises OutputError where the writing fails."""
    try:
        storage = Storage(url)
        storage.write(PROBE, b"")
        with suppress(StorageError):  # credentials that may write but not delete are good enough for a job
            storage.remove(PROBE)
    except StorageError as error:
        why = cause(error.__cause__ or error)
        raise OutputError(f"cannot write to output {safe_url(url)}: {why}") from error
