"""Keeps the rows that cannot be read from ending the whole job: they are set aside, and a new run tries them first.

A run that ends with such rows names them in `_job/set_aside.json`. The next run tries to read them in a child process
of the driver, before any replica loads its model for them. The record only saves time; without it, replicas find the
same rows again.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Annotated

from pydantic import Field

from model.errors import TwoTowerError
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed, StorageError
from pipeline.core.text import counted, printable
from pipeline.core.types import WorkUnit
from pipeline.input.unit_reader import UnitReader
from pipeline.output.layout import JOB, SET_ASIDE
from pipeline.output.records import Count, NotOursError, Record, to_json
from pipeline.planning.plan import Plan
from pipeline.prompts.setup import PromptSetup
from pipeline.storage.storage import Storage

Unread = Mapping[str, Mapping[tuple[int, int], str]]
"""By unit id, the ranges of rows (first and end position in the unit) that cannot be read, each with the reason."""
SHOWN = 3
"""The most ranges that an error names."""


class SetAsideError(JobFailed):
    """All work that can be done is done, but some units are set aside, because some of their rows cannot be read."""

    def __init__(self, unread: Unread, units: Mapping[str, WorkUnit], total: int) -> None:
        """`unread`: by unit id, what cannot be read. `units`: these units. `total`: the number of units of the job."""
        self.unread = unread
        ranges = [(units[unit_id], span, why) for unit_id, of_unit in unread.items() for span, why in of_unit.items()]
        rows = sum(end - first for _, (first, end), _ in ranges)
        named = [
            f"{unit.describe(*span)} of unit {unit.id}: {printable(why).rstrip('.')}"
            for unit, span, why in ranges[:SHOWN]
        ]
        more = [f"and {len(ranges) - SHOWN} more, which _job/set_aside.json names"] if len(ranges) > SHOWN else []
        super().__init__(
            f"{len(unread)} of {counted(total, 'unit')} could not be completed and are set aside, because "
            f"{counted(rows, 'row')} cannot be read: {'; '.join([*named, *more])}. All other rows are finished and "
            "saved. Put back the same files, with their sizes and modification times (cp -p), and submit the same job: "
            "it tries only what is missing"
        )


class _Range(Record):
    unit: str
    first: Count
    end: Count
    """The position in the unit after the last row of the range."""
    reason: str


class _SetAside(Record):
    fingerprint: str
    """The digest of the job's fingerprint."""
    ranges: Annotated[tuple[_Range, ...], Field(strict=False)]


def write_unread(job: Job, plan: Plan, unread: Unread) -> None:
    """Write the record of what cannot be read. A failure of the storage is ignored."""
    ranges = [
        {"unit": unit_id, "first": first, "end": end, "reason": reason}
        for unit_id, of_unit in unread.items()
        for (first, end), reason in of_unit.items()
    ]
    with suppress(StorageError):
        storage = Storage(job.output.path, anchor=JOB)
        storage.write(SET_ASIDE, to_json({"fingerprint": plan.fingerprint.digest, "ranges": ranges}))


def still_unread(job: Job, plan: Plan, units: Sequence[WorkUnit]) -> dict[str, dict[tuple[int, int], str]]:
    """Return what an earlier run could not read and what cannot be read now either, by unit id.

    All other rows of these units were in segments when the record was written. A unit of which something can be read
    by now is left out: it is work like any other. `units`: those without a part. The record of the earlier run is
    removed; without one, nothing is read. Raises StorageError if the record cannot be read or removed.
    """
    storage = Storage(job.output.path, anchor=JOB)
    if (data := storage.read_if_exists(SET_ASIDE)) is None:
        return {}
    storage.remove(SET_ASIDE)
    with suppress(NotOursError):
        record = _SetAside.read(data)
        open_units = {unit.id: unit for unit in units} if record.fingerprint == plan.fingerprint.digest else {}
        known = [each for each in record.ranges if each.unit in open_units]
        pieces = [
            (each, open_units[each.unit]) for each in known if each.first < each.end <= open_units[each.unit].row_count
        ]
        reasons = _try_to_read(job, plan.prompts, [unit.part(each.first, each.end) for each, unit in pieces])
        found: dict[str, dict[tuple[int, int], str]] = {}
        for (each, _), reason in zip(pieces, reasons, strict=True):
            found.setdefault(each.unit, {})[each.first, each.end] = reason
        return {unit_id: of_unit for unit_id, of_unit in found.items() if all(of_unit.values())}
    return {}


def _try_to_read(job: Job, prompts: PromptSetup, units: Sequence[WorkUnit]) -> list[str]:
    """Return why the rows of each unit cannot be read; "" if they can.

    They are read in a child process, because a file may be so damaged that reading it ends the process.
    """
    reasons: list[str] = []
    while len(reasons) < len(units):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            try:
                while len(reasons) < len(units):
                    reasons.append(child.submit(_read, job, prompts, units[len(reasons)]).result())
            except BrokenProcessPool:
                reasons.append("reading it ended the process")
    return reasons


def _read(job: Job, prompts: PromptSetup, unit: WorkUnit) -> str:
    try:
        reader = UnitReader(job.input, prompts, keep_prompt=job.output.keep_prompt)
        try:
            reader.read(unit)
        finally:
            reader.close()
    except TwoTowerError as error:
        return str(error)
    return ""
