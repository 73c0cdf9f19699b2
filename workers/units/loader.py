"""Opens assignments in two steps: looks at what is saved of them, then reads and tokenises the rows that are left.

If the unit's part exists already, no rows are read. Rows in segments are finished and are kept as they are. Of the
other rows, those without a usable prompt become error rows here. The rows are sorted for the engine.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.requests import GenerationParams
from model.runtime.page_allocator import PREFIX_SLOTS
from pipeline.core.errors import InputError
from pipeline.core.schema import RESULT_SCHEMA
from pipeline.core.types import CONTROL, Assignment, Row, UnitResult, WorkUnit
from pipeline.input.fetcher import Fetch
from pipeline.input.row_settings import with_settings
from pipeline.output.positions import positions
from pipeline.output.segments import SegmentRows
from pipeline.output.unit_store import UnitStore
from pipeline.prompts.encoder import EncoderLike
from workers.units.prefix import best_prefix, has_prefix
from workers.units.unit import OpenUnit, QueuedRow, name_of

CONTROL_PROMPT = "The capital of France is"
"""The prompt of a control. It is a default prompt of canary.json as well; every tokenizer yields tokens for it."""
CONTROL_TOKENS = 64
"""The most tokens of a control's completion: some blocks, so that every kind of forward is run."""
TOKENISE_ROWS = 1000
"""The number of prompts that are tokenised in one call. It limits how many token ids are in Python lists at a time."""


@dataclass(frozen=True, slots=True)
class Found:
    """What `UnitLoader.look` found of a unit without a part."""

    segments: SegmentRows
    fetch: Fetch
    """The files of the rows, which are being fetched."""


class UnitLoader:
    """Makes an OpenUnit of each assignment: `look` may be called in several threads at a time, `open` only in one.

    It remembers the prefixes that prompts of recent units had in common, because the engine still holds them.
    """

    def __init__(
        self,
        encoder: EncoderLike,
        store: UnitStore,
        *,
        params: GenerationParams,
        replica: str,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """Create a loader for one replica.

        `encoder` tokenises prompts. `params`: the job's generation settings. `replica`: the replica's name. `tell` is
        called with messages for the operator. `clock` returns the time in seconds by which the units are timed.
        """
        self._encoder, self._store, self._params, self._replica = encoder, store, params, replica
        self._tell, self._clock = tell, clock
        self._prefixes: deque[array[int]] = deque(maxlen=PREFIX_SLOTS)  # those used most recently, newest last

    def look(self, work: Assignment) -> Found | UnitResult:
        """Return what is saved of the assignment, for `open`, or the result of its unit if the part exists.

        These are a few requests to the storage for every unit, so that small units need several threads to keep the
        engine busy. From then on, small files of the unit are fetched. A message says if the part exists. Raises
        StorageError if the storage fails, OutputError if the unit's part is broken or not this job's.
        """
        unit = work.unit
        if (result := self._store.published(unit)) is not None:
            self._tell(
                f"unit {unit.id}: its part exists already, published by replica {result.replica} in attempt "
                f"{result.attempt}"
            )
            return result
        segments = self._store.read_segments(unit)
        return Found(segments, self._store.input.fetch(unit.part(*work.span)))

    def open(self, work: Assignment, found: Found) -> OpenUnit:
        """Return the assignment with the rows that are to be generated.
        Messages say which segments are left out, and how many rows segments hold. Raises StorageError if the storage
        fails, InputError if the unit cannot be read.
        """
        unit, segments = work.unit, found.segments
        for text in segments.ignored if work.rows is None else ():  # only for a whole unit, not for each of its ranges
            self._tell(text)
        first, end = work.span
        saved = positions(unit, segments.table)  # ascending
        start, stop = np.searchsorted(saved, [first, end])
        kept = segments.table.slice(start, stop - start)
        if kept.num_rows:
            self._tell(f"{name_of(work)}: rows finished by earlier attempts: {kept.num_rows} of {end - first}")
        wanted = np.setdiff1d(np.arange(first, end), saved[start:stop]).tolist()
        data = None
        if work.rows is None or wanted:
            data = self._store.input.read(unit if work.rows is None else unit.part(first, end), found.fetch)
        else:
            found.fetch.close()
        opened = OpenUnit(
            work,
            replace(data, rows=[]) if data and work.rows is None else None,  # drop the text: prompts are kept as tokens
            kept,
            end - first,
            params=self._params,
            replica=self._replica,
            now=self._clock(),
        )
        if data is not None:
            condemned = dict(work.condemned)
            for index in wanted:
                if index in condemned:
                    opened.add_error(index, condemned[index])
            rows = [data.rows[index - first] for index in wanted if index not in condemned]
            # Positions of a range are counted from its own first row where it is read.
            self._queue(opened, [replace(row, index=first + row.index) for row in rows] if first else rows)
        return opened

    def open_control(self, work: Assignment) -> OpenUnit:
        """Return a control (Assignment.control), ready to be generated: the fixed prompt, or the finished row of the
        unit that has the most tokens.

        Raises InputError if no row of the unit is in segments, or if the row cannot be read; StorageError if the
        storage fails.
        """
        opened = OpenUnit(
            work,
            None,
            RESULT_SCHEMA.empty_table(),
            1,
            params=self._params,
            replica=self._replica,
            now=self._clock(),
        )
        if work.unit.id == CONTROL:
            row = Row("control", 0, 0, CONTROL_PROMPT)
            params = replace(self._params, max_new_tokens=min(self._params.max_new_tokens, CONTROL_TOKENS))
        else:
            row = self._finished_row(work.unit)
            params = with_settings(self._params, row.settings)
        [ids] = self._encoder.encode([row])
        opened.queue.append(QueuedRow(row.index, array("i", ids), 0, params))
        return opened

    def _finished_row(self, unit: WorkUnit) -> Row:
        table = self._store.read_segments(unit).table
        failed = pc.equal(table["finish_reason"], pa.scalar("error")).to_numpy()
        lengths = np.where(failed, -1, pc.add(table["prompt_tokens"], table["completion_tokens"]).to_numpy())
        if not len(lengths) or lengths.max() < 0:
            raise InputError(f"no row of unit {unit.id} is finished that could be generated once more")
        index = int(positions(unit, table)[lengths.argmax()])
        [row] = self._store.input.read(unit.part(index, index + 1)).rows
        return replace(row, index=index)

    def _queue(self, opened: OpenUnit, rows: Iterable[Row]) -> None:
        """Tokenise the rows and queue them in `opened`, those with the most tokens after the common prefix first.

        A row without a prompt, or whose prompt has no tokens, becomes an error row.
        """
        good = []
        for row in rows:
            if row.prompt is None:
                opened.add_error(row.index, row.error or "the row has no prompt")
            else:
                good.append(row)
        tokenised: list[tuple[Row, array[int]]] = []
        for start in range(0, len(good), TOKENISE_ROWS):
            chunk = good[start : start + TOKENISE_ROWS]
            for row, ids in zip(chunk, self._encoder.encode(chunk), strict=True):
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
        opened.held_bytes += sum(len(row.ids) * row.ids.itemsize for row in queued)

    def _find_prefix(self, prompts: "Sequence[array[int]]") -> "array[int]":
        """Return the prefix that the engine is to compute once for these prompts, and remember it for the next units.

        It is empty if none saves anything.
        """
        prefix = best_prefix(prompts, self._prefixes)
        if prefix:
            if prefix in self._prefixes:
                self._prefixes.remove(prefix)
            self._prefixes.append(prefix)
        return prefix
