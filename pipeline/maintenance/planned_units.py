"""Says which rows the work units of an output hold according to its plan.json, for `verify` and `clean`."""

from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.types import Piece, WorkUnit
from pipeline.output.job_records import PlanRecord
from pipeline.output.records import UnitRecord
from pipeline.planning.packing import unit_id


class PlannedUnits:
    """The work units of an output. `find` may be called from many threads."""

    def __init__(self, plan: PlanRecord) -> None:
        self._listing, self._rules = plan.listing, plan.unit_rules
        self._stored = {unit_id(spans[0].file, spans[0].first_row): spans for spans in plan.units_stored}

    def find(self, record: UnitRecord) -> WorkUnit | None:
        """Return the plan's unit with the id of this record, or None if the plan has no such unit.

        The pieces of the unit do not say where their files are. With version 1 of the unit rules, the plan does not
        say where the files were cut: the result then is the unit with the rows of the record, if they begin at the row
        that the id names and are all in the file.
        """
        if self._rules > 1:
            spans = self._stored.get(record.unit, ())
            return WorkUnit(record.unit, tuple(self._piece(*span) for span in spans)) if spans else None
        first = record.pieces[0]
        if len(record.pieces) > 1 or record.unit != unit_id(first.file, first.first_row):
            return None
        if first.file not in self._listing or first.first_row + first.rows > self._listing[first.file][2]:
            return None
        return WorkUnit(record.unit, (self._piece(first.file, first.first_row, first.rows),), rules=1)

    def _piece(self, file: str, first_row: int, rows: int) -> Piece:
        size, stamp, _ = self._listing[file]
        return Piece("", file, first_row, rows, size, stamp)


def sources(unit: WorkUnit, first: int, count: int) -> tuple["pa.Array[Any] | pa.Scalar[Any]", npt.NDArray[np.int64]]:
    """Return the values of (source_file, source_row) for `count` rows of a unit from position `first` on.

    If all these rows are in one file, its name is a scalar, which is faster to compare with.
    """
    begin, end = bisect_right(unit.starts, first) - 1, bisect_right(unit.starts, first + count - 1)
    pieces = unit.pieces[begin:end]
    place = np.arange(first, first + count)
    if len(pieces) == 1:
        return pa.scalar(pieces[0].name), place + (pieces[0].first_row - unit.starts[begin])
    starts = np.array(unit.starts[begin:end])
    number = np.searchsorted(starts, place, side="right") - 1
    shift = np.array([piece.first_row for piece in pieces]) - starts
    indices: Any = pa.array(number)
    return pa.array([piece.name for piece in pieces]).take(indices), place + shift[number]
