"""What the unit runner needs of the engine, the tokenizer and the storage: protocols, so that fakes drop in."""

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from model.requests import Completion, Request
from pipeline.core.types import UnitResult, WorkUnit
from pipeline.input.unit_reader import UnitData
from pipeline.output.segments import SegmentRows


class EngineLike(Protocol):
    """What the runner needs of model.Engine."""

    @property
    def waiting(self) -> int:
        """Requests that are not in a slot yet."""

    @property
    def max_rows(self) -> int:
        """Rows generated together at most. It falls where memory runs out."""

    def submit(self, request: Request) -> None:
        """Raises RequestError where the request can never run."""

    def step(self) -> Sequence[Completion]:
        """One turn of the engine; the rows that finished in it. Raises EngineError with the rows that it lost."""


class TokenizerLike(Protocol):
    """What the unit loader needs of a checkpoint's tokenizer."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]: ...


class UnitStore(Protocol):
    """Where units are read and parts go. Called from threads. All raise StorageError where the storage fails, and read,
    published and publish another TwoTowerError where trying this unit again cannot help."""

    def close(self) -> None:
        """Lets go of what reading holds."""

    def published(self, unit: WorkUnit) -> UnitResult | None:
        """The part that another attempt has published, if there is one."""

    def read(self, unit: WorkUnit) -> UnitData: ...

    def read_segments(self, unit: WorkUnit) -> SegmentRows: ...

    def write_segment(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None: ...

    def publish(
        self, data: UnitData, rows: Sequence[pa.Table], *, writer: str, attempt: int, seconds: float
    ) -> UnitResult:
        """`rows`: RESULT_SCHEMA, each row of the unit once. The segments are gone when it returns."""
