"""Finds rows of an output, finished or not, in its parts, and reads them (`show OUTPUT`).

A part is searched row group by row group: those that cannot have a match, by their statistics, are not read, and of the
others only the columns that decide. All other columns are read for the rows that are found.
"""

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, repeat
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
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import PARTS, part_name
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError, read_part
from pipeline.planning.fingerprint import COLUMNS
from pipeline.planning.packing import unit_id
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
    """The places of the rows in the part, from 0, ascending, at most as many as were wanted."""


class RowSearch:
    """A search for rows of one output in input order, in which the rows of a unit follow each other.

    Parts that are broken or of another job are left out, as in `status`, and so are rows of units that have no part
    yet.
    """

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
                return _Hits(totals, range(min(most, record.rows)))
            rows: list[int] = []
            for places in self._matches(source) if totals.errors or not self._errors else ():
                rows += places
                if len(rows) >= most:
                    break
            return _Hits(totals, rows[:most])

    def _read(self, part: FileInfo, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part at these places."""
        columns = ["id", *self.carried, *_STATISTICS]
        with self._guard(part), self._storage.open(part.name, part.size) as source:
            metadata, done = pq.read_metadata(source), 0
            starts = _group_starts(metadata)
            groups = dict.fromkeys(bisect_right(starts, row) - 1 for row in rows)
            for first, batch in _batches(source, metadata, groups, columns):
                end = bisect_left(rows, first + batch.num_rows)
                wanted = pa.array([row - first for row in rows[done:end]], pa.int64())
                table = pa.Table.from_batches([batch]).take(wanted)
                done = end
                cells = [read_cells(table[name]) for name in columns]
                yield from (dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True))
                if done == len(rows):
                    return

    def _matches(self, source: Any) -> Iterator[list[int]]:
        """Yield the places of the rows of a part for which all conditions hold."""
        fragment: Any = ds.ParquetFileFormat().make_fragment(source)
        schema = fragment.physical_schema
        expression = functools.reduce(and_, (each.expression(schema) for each in self._conditions))
        # The statistics of a row group leave out NaN, so a search for it looks at all groups.
        kept = fragment if "is_nan" in str(expression) else fragment.subset(filter=expression)
        columns = list(dict.fromkeys(condition.column for condition in self._conditions))
        place = max(columns, key=len) + "#"  # a name that no column has
        for first, batch in _batches(source, fragment.metadata, [group.id for group in kept.row_groups], columns):
            places = pa.array(range(first, first + batch.num_rows), pa.int64())
            table = pa.Table.from_batches([batch]).append_column(place, places)
            yield table.filter(expression)[place].to_numpy().tolist()

    @contextmanager
    def _guard(self, part: FileInfo) -> Iterator[None]:
        """Turn errors of reading a part into OutputError."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise OutputError(f"output {self._shown}: {part.name}: {one_line(error)}; run `verify`") from error


def _batches(
    source: Any, metadata: pq.FileMetaData, groups: Iterable[int], columns: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (place of the first row in the part, rows with `columns`) for the rows of these row groups in batches."""
    starts = _group_starts(metadata)
    with pq.ParquetFile(source, metadata=metadata, pre_buffer=True, page_checksum_verification=True) as file:
        for group in groups:  # one at a time, so that only one is held in memory
            first = starts[group]
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
                yield first, batch
                first += batch.num_rows


def _group_starts(metadata: pq.FileMetaData) -> list[int]:
    """Return the place of the first row of each row group, and the number of all rows."""
    sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return list(accumulate(sizes, initial=0))


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
    """Return the parts whose names are those of units of the plan's files, in the order in which the first row of each
    stands in the input."""
    # The names of parts begin with a hash of the name of that row's file, so their own order is another one.
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
