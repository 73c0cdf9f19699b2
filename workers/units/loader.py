"""Opens work units: reads their rows, skips the finished ones, tokenises the rest and sorts them for the engine.

If the unit's part exists already, nothing is read. Rows found in segments are kept as they are. Other rows that cannot
be generated become error rows here.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from model.requests import GenerationParams
from model.runtime.page_allocator import PREFIX_SLOTS
from pipeline.core.types import Assignment, Row, UnitResult
from pipeline.input.row_settings import with_settings
from pipeline.output.unit_store import UnitStore
from workers.units.prefix import best_prefix, has_prefix
from workers.units.protocols import TokenizerLike
from workers.units.unit import OpenUnit, QueuedRow, name_of

TOKENISE_ROWS = 1000
"""Number of prompts tokenised in one call; it limits how many token ids exist as Python lists at a time."""


class UnitLoader:
    """Opens assignments, one at a time."""

    def __init__(
        self,
        tokenizer: TokenizerLike,
        store: UnitStore,
        *,
        params: GenerationParams,
        replica: str,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """Create a loader. `params` are the job's settings; `tell` is called with messages for the operator."""
        self._tokenizer, self._store, self._params, self._replica = tokenizer, store, params, replica
        self._tell, self._clock = tell, clock
        self._prefixes: deque[array[int]] = deque(maxlen=PREFIX_SLOTS)  # those used most recently, newest last

    def open(self, work: Assignment) -> OpenUnit | UnitResult:
        """Return the assignment ready to generate, or the result of its unit if its part is published already.

        Raises what the store and its input raise.
        """
        unit = work.unit
        if (result := self._store.published(unit)) is not None:
            self._tell(
                f"unit {unit.id}: its part is there, published by replica {result.replica} in attempt {result.attempt}"
            )
            return result
        segments = self._store.read_segments(unit)
        for text in segments.ignored if work.rows is None else ():  # only for a whole unit, not for each of its ranges
            self._tell(text)
        first, end = work.span
        kept = _between(segments.table, unit.first_row + first, unit.first_row + end)
        if kept.num_rows:
            self._tell(f"{name_of(work)}: {kept.num_rows} of {end - first} rows were finished by earlier attempts")
        wanted = np.setdiff1d(np.arange(first, end), kept["source_row"].to_numpy() - unit.first_row).tolist()
        # The file of a condemned row is not opened, because reading it may be what kills the replicas.
        needed = work.rows is None or (wanted and not work.condemned)
        data = self._store.input.read(unit) if needed else None
        opened = OpenUnit(
            work,
            replace(data, rows=[]) if data and work.rows is None else None,  # drop the text: prompts are kept as tokens
            kept,
            end - first,
            params=self._params,
            replica=self._replica,
            now=self._clock(),
        )
        if data is None:
            for index in wanted:
                opened.add_error(index, str(work.condemned))
        else:
            self._queue(opened, [data.rows[index] for index in wanted])
        return opened

    def _queue(self, opened: OpenUnit, rows: Iterable[Row]) -> None:
        good = []
        for row in rows:
            if row.prompt is None:
                opened.add_error(row.index, row.error or "the row has no prompt")
            else:
                good.append((row, row.prompt))
        tokenised: list[tuple[Row, array[int]]] = []
        for start in range(0, len(good), TOKENISE_ROWS):
            chunk = good[start : start + TOKENISE_ROWS]
            encoded = self._tokenizer.encode_batch([prompt for _, prompt in chunk])
            for (row, _), ids in zip(chunk, encoded, strict=True):
                if ids:
                    tokenised.append((row, array("i", ids)))
                else:
                    opened.add_error(row.index, "the prompt has no tokens")
        prefix = self._find_prefix([ids for _, ids in tokenised])
        params = {own: with_settings(self._params, own) for own in {row.settings for row, _ in tokenised}}
        queued = [
            QueuedRow(row.index, ids, len(prefix) if has_prefix(ids, prefix) else 0, params[row.settings], row.settings)
            for row, ids in tokenised
        ]
        opened.queue.extend(sorted(queued, key=lambda row: (row.prefix_tokens - len(row.ids), row.index)))

    def _find_prefix(self, prompts: "Sequence[array[int]]") -> "array[int]":
        """Return the common prefix to use for these prompts, and remember it for the next units."""
        prefix = best_prefix(prompts, self._prefixes)
        if prefix:
            if prefix in self._prefixes:
                self._prefixes.remove(prefix)
            self._prefixes.append(prefix)
        return prefix


def _between(table: pa.Table, first: int, end: int) -> pa.Table:
    """Return the rows with first <= source_row < end of a table that is sorted by source_row."""
    start, stop = np.searchsorted(table["source_row"].to_numpy(), [first, end])
    return table.slice(start, stop - start)
