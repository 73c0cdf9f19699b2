"""Finds rows of an output, finished or not, in its parts, and reads them (`show OUTPUT`).

A part is searched row group by row group: those that cannot have a match, by their statistics, are not read, and of the
others only the columns that decide. All other columns are read for the rows that are found.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from operator import and_
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.core.errors import JobError, OutputError
from pipeline.core.schema import RESULT_COLUMNS
from pipeline.core.text import one_line, visible
from pipeline.core.types import Totals
from pipeline.output.layout import PARTS, part_name
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError, PlanRecord, read_part
from pipeline.planning.fingerprint import COLUMNS
from pipeline.planning.plan import unit_id
from pipeline.prompts.values import read_cells
from pipeline.storage.storage import FileInfo, Storage
from pipeline.storage.urls import safe_url

THREADS = 4
"""Number of parts that are searched at the same time, once the first one has been."""
BATCH_ROWS = 1024
"""Number of rows that are decoded at a time."""
_STATISTICS = (
    *("finish_reason", "error", "completion", "mode", "completion_tokens", "denoiser_forwards", "tokens_per_forward"),
    *("latency_s", "attempt", "source_file", "source_row"),
)
"""The RESULT_COLUMNS that are read of a row that is found."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition `COLUMN=VALUE` on a row."""

    column: str
    value: str
    """The value as text. It is converted to the type of the column; `null` stands for a null."""

    def expression(self, schema: pa.Schema) -> Any:
        """Return the condition as a pyarrow expression for parts with this schema.

        Raises JobError if the text is no value of the column.
        """
        field: Any = pc.field(self.column)
        kind = schema.field(self.column).type
        if self.value == "null":
            return field.is_null()
        if pa.types.is_nested(kind):
            raise JobError(
                f"--where {visible(self.column)}={visible(self.value)}: the column holds {kind}, which has no value to "
                "compare; only null can be asked for"
            )
        try:
            value = pa.scalar(self.value, pa.string()).cast(kind)
        except (pa.ArrowException, ValueError):  # ValueError: the text is not Unicode
            raise JobError(
                f"--where {visible(self.column)}={visible(self.value)}: the column holds {kind}, and "
                f"{visible(self.value) or 'an empty text'} is no such value; null finds rows without a value"
            ) from None
        if pa.types.is_floating(kind) and math.isnan(value.as_py()):
            return field.is_nan()  # NaN is not equal to itself
        return field == value


@dataclass(frozen=True, slots=True)
class _Hits:
    """The rows found in one part."""

    totals: Totals
    """The totals of the whole part."""
    rows: Sequence[int]
    """Row numbers in the input file, ascending, at most as many as were wanted."""


class RowSearch:
    """A search for rows of one output in input order. Parts that are broken or of another job are left out, as in
    `status`, and so are rows of units that have no part yet."""

    def __init__(self, output_path: str, *, errors: bool = False, where: Sequence[str] = ()) -> None:
        """Read the plan of the output and list its parts.

        `errors`: only error rows. `where`: conditions `COLUMN=VALUE`, which must all hold. Raises OutputError if the
        folder is not a job's output, JobError if a condition names no column of it, StorageError if the storage fails.
        """
        plan = Ledger(output_path).read_plan()
        self.carried = tuple(_input_columns(plan))
        """The names of the columns between `id` and the results: the carried columns and, if there is one, `prompt`."""
        self.planned = plan.rows
        """Number of input rows of the job."""
        self.published = 0
        """Number of rows in the parts that `rows` has looked at so far: all of them, once it has found nothing."""
        self._conditions = [_condition(text, ("id", *self.carried, *RESULT_COLUMNS)) for text in where]
        if errors:
            self._conditions.append(Condition("finish_reason", "error"))
        self._errors, self._digest = errors, plan.fingerprint.digest
        self._storage, self._shown = Storage(output_path), safe_url(output_path)
        self._parts = _in_input_order(self._storage.list_files("", PARTS), plan)

    def rows(self, most: int) -> Iterator[dict[str, Any]]:
        """Yield the first `most` rows that match, as values by column: `id`, `carried` and some of the results.

        A cell that Python cannot hold is a pipeline.prompts.values.CellError. Only as many parts are read as needed,
        and a few more. Raises JobError if the value of a condition does not fit its column, OutputError if a part is
        damaged, StorageError if the storage fails.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for parts in _slices(self._parts):
                for part, hits in zip(parts, pool.map(self._search, parts, repeat(most)), strict=False):
                    if hits is None:
                        continue
                    self.published += hits.totals.rows
                    if found := hits.rows[:most]:
                        yield from self._read(part, found)
                        most -= len(found)
                    if not most:
                        return

    def _search(self, part: FileInfo, most: int) -> _Hits | None:
        """Return the first rows of a part that match, at most `most`; None if the part is broken or another job's."""
        with self._guard(part), self._storage.open(part.name, part.size) as source:
            try:
                record, totals = read_part(source)
            except NotOursError:
                return None
            if (part_name(record.unit), record.fingerprint) != (part.name, self._digest):
                return None
            if not self._conditions:
                return _Hits(totals, range(record.first_row, record.first_row + min(most, record.rows)))
            rows: list[Any] = []
            if totals.errors or not self._errors:
                needed = [*(condition.column for condition in self._conditions), "source_row"]
                for table in self._matches(source, needed):
                    rows += table["source_row"].to_pylist()
                    if len(rows) >= most:
                        break
            return _Hits(totals, rows[:most])

    def _read(self, part: FileInfo, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part that have these numbers in the input file."""
        columns = ["id", *self.carried, *_STATISTICS]
        with self._guard(part), self._storage.open(part.name, part.size) as source:
            left = len(rows)
            for table in self._matches(source, columns, pc.field("source_row").isin(list(rows))):
                cells = [read_cells(table[name]) for name in columns]
                yield from (dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True))
                left -= table.num_rows
                if not left:
                    return

    def _matches(self, source: Any, columns: Sequence[str], expression: Any = None) -> Iterator[pa.Table]:
        """Yield the rows for which the expression holds, or all conditions if it is None, as tables with `columns`."""
        fragment: Any = ds.ParquetFileFormat().make_fragment(source)
        if expression is None:
            schema = fragment.physical_schema
            expression = functools.reduce(and_, (each.expression(schema) for each in self._conditions))
        # The statistics of a row group leave out NaN, so a search for it looks at all groups.
        kept = fragment if "is_nan" in str(expression) else fragment.subset(filter=expression)
        groups = [group.id for group in kept.row_groups]
        with pq.ParquetFile(
            source, metadata=fragment.metadata, pre_buffer=True, page_checksum_verification=True
        ) as file:
            for group in groups:  # one at a time, so that only one is held in memory
                for batch in file.iter_batches(
                    BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    yield pa.Table.from_batches([batch]).filter(expression)

    @contextmanager
    def _guard(self, part: FileInfo) -> Iterator[None]:
        """Turn errors of reading a part into OutputError."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise OutputError(f"output {self._shown}: {part.name}: {one_line(error)}; run `verify`") from error


def _input_columns(plan: PlanRecord) -> list[str]:
    """Return the names of the columns of the parts that come from the input, without `id`, in their order."""
    return [name for name in plan.fingerprint.fields.get(COLUMNS, {}) if name != "id"]


def _condition(text: str, columns: Sequence[str]) -> Condition:
    """Return the condition in a text `COLUMN=VALUE`. A name of a column may itself hold `=`."""
    named = [name for name in columns if text.startswith(f"{name}=")]
    if not named:
        column = text.partition("=")[0]
        known = ", ".join(map(visible, columns))
        raise JobError(f"--where: the output has no column '{visible(column)}'; its columns: {known}")
    column = max(named, key=len)
    return Condition(column, text[len(column) + 1 :])


def _in_input_order(parts: Sequence[FileInfo], plan: PlanRecord) -> list[FileInfo]:
    """Return the parts whose names are those of units of the plan's files, in the order of the input."""
    # The names of parts begin with a hash of the name of the file, so their own order is another one.
    places = {unit_id(file.name, 0).partition("-")[0]: place for place, file in enumerate(plan.files)}
    found = []
    for part in parts:
        file, _, row = part.name.removeprefix("part-").removesuffix(".parquet").partition("-")
        if file in places and row.isdecimal():
            found.append((places[file], int(row), part))
    return [part for _, _, part in sorted(found, key=lambda each: each[:2])]


def _slices(parts: Sequence[FileInfo]) -> Iterator[Sequence[FileInfo]]:
    """Yield the first part alone, as it is often enough, then the others THREADS at a time."""
    yield parts[:1]
    for start in range(1, len(parts), THREADS):
        yield parts[start : start + THREADS]
