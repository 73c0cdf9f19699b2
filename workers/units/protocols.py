"""Defines protocols for what the unit runner needs from engine, tokenizer and storage, so that tests can use fakes."""

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from model.requests import Completion, Request
from pipeline.core.types import UnitResult, WorkUnit
from pipeline.input.unit_reader import UnitData
from pipeline.output.segments import SegmentRows


class EngineLike(Protocol):
    """The part of model.Engine that the runner uses."""

    @property
    def waiting(self) -> int:
        """Return the number of requests that have no slot yet."""

    @property
    def max_rows(self) -> int:
        """Return the largest number of rows generated together. It falls if memory runs out."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run."""

    def step(self) -> Sequence[Completion]:
        """Run one step and return the rows that finished in it.

        Raises EngineError if the step fails; the error names the rows that were lost.
        """


class TokenizerLike(Protocol):
    """The part of a checkpoint's tokenizer that the unit loader uses."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...


class UnitStore(Protocol):
    """The reader of units and writer of segments and parts. Its methods are called from several threads.

    All of them raise StorageError if the storage fails. `read`, `published` and `publish` raise another TwoTowerError
    if a retry of the unit cannot help.
    """

    def close(self) -> None:
        """Release what reading keeps open, such as the input file."""

    def published(self, unit: WorkUnit) -> UnitResult | None:
        """Return the result of the unit's part, or None if no attempt has published it yet."""

    def read(self, unit: WorkUnit) -> UnitData: ...

    def read_segments(self, unit: WorkUnit) -> SegmentRows: ...

    def write_segment(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None: ...

    def publish(
        self, data: UnitData, rows: Sequence[pa.Table], *, writer: str, attempt: int, seconds: float
    ) -> UnitResult:
        """Publish the unit's part, remove its segments and return the result.

        `rows` are tables with RESULT_SCHEMA that hold each row of the unit exactly once.
        """
