"""Converts the records of units (in parts and segments, and commit records) to and from Python values."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.messages import shown
from pipeline.core.schema import SCHEMA_VERSION
from pipeline.core.text import counted, one_line, printable
from pipeline.core.types import Totals, UnitResult, WorkUnit
from pipeline.output.part import TOTALS_KEY

RECORD_KEY = "twotower.unit"
"""The key of a part's PartRecord in the key-value metadata of the Parquet file."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A count as a field of a record: not negative, and small enough for 64 bits."""


class NotOursError(ValueError):
    """The content of a file is not what this project, or this job, writes under its name.

    The message says what is wrong, without the name of the file.
    """


class OtherSchemaError(NotOursError):
    """A part was written by a version of this project with another schema. The message says what to do."""


def other_schema(version: object) -> str:
    """Return what is wrong with a part or an output of this schema version, and what to do."""
    return (
        f"was written with version {printable(str(version))} of the schema of parts, and this version of twotower "
        f"writes {SCHEMA_VERSION}: finish it with the version that began it, or use another output.path"
    )


class Record(BaseModel):
    """The base of the models that check a JSON record when it is read from an output folder.

    Types are not converted: "1" and true are not numbers. Unknown keys are ignored. Records of earlier versions may
    lack fields that have a default.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Return the record in these JSON bytes. Raises NotOursError, which names the first wrong key, if they hold no
        such record."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise NotOursError(_first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a record, in one line that names the key."""
    fault = error.errors(include_url=False)[0]
    key = printable(".".join(map(str, fault["loc"])))
    if fault["type"] == "missing":
        return f"it has no {key}"
    if fault["type"] == "json_invalid":
        return f"not JSON: {fault['ctx']['error']}"
    if fault["type"] == "value_error":  # raised by a validator of this project
        return f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    return f"{key} is {shown(fault['input'])}" if key else "not a JSON object"


class PieceRecord(Record):
    """A range of rows of one input file, in the record of a part or a segment."""

    file: str
    """The name of the input file (Piece.name)."""
    first_row: Count
    rows: Count
    size: int
    """The size of the input file in bytes. With `stamp`, it tells which version of the file the rows were read from."""
    stamp: str

    def __str__(self) -> str:
        """Return the rows for a message: `rows 0 to 9 of a.parquet`."""
        return f"rows {self.first_row} to {self.first_row + self.rows - 1} of {self.file}"


class RulesRecord(Record):
    """The versions of the rules by which a job was planned, from which a lost plan.json can be made again."""

    units: Count
    """How units were cut (UNIT_RULES)."""
    prompts: Count
    """How prompts were made (pipeline.prompts.setup.RULES)."""


class UnitRecord(Record):
    """The rows of a unit, as the records of its part and its segments name them.

    Records of version 1 of the unit rules hold the keys of their only piece themselves, and no `rules`.
    """

    unit: str
    """The unit's id."""
    pieces: Annotated[tuple[PieceRecord, ...], Field(min_length=1, fail_fast=True, strict=False)]
    """The pieces of the unit, in the order of its rows."""
    rows: Count
    """The number of rows of the unit."""
    rules: RulesRecord | None = None
    schema_version: Count
    fingerprint: str
    """The digest of the job's fingerprint."""
    prompt_date: str | None = None
    """The day that chat templates printed, as YYYY-MM-DD; None without a chat template, and in segments of earlier
    versions."""

    @model_validator(mode="before")
    @classmethod
    def _read_single_piece(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "pieces" in data or "file" not in data:
            return data
        piece = {name: data[name] for name in PieceRecord.model_fields if name in data}
        return {"pieces": (piece,), **{name: value for name, value in data.items() if name not in _OF_A_PIECE}}

    @model_validator(mode="after")
    def _check_pieces(self) -> Self:
        if (held := sum(piece.rows for piece in self.pieces)) != self.rows:
            raise ValueError(f"rows is {self.rows}, its pieces have {held}")
        return self

    def fields(self) -> dict[str, Any]:
        """Return the record as JSON values, in the form in which its version of the rules stores it."""
        fields = self.model_dump(exclude_none=True)
        if self.rules is not None:
            return fields
        piece = fields.pop("pieces")[0]
        return {"unit": fields.pop("unit"), **piece, **fields}

    def difference(self, unit: WorkUnit) -> str | None:
        """Return what is wrong if this is not the record of the unit: other rows, or another version of a file.

        Returns None if nothing is.
        """
        if self.unit != unit.id:
            return f"it holds unit {self.unit}, not {unit.id}"
        for number, (found, piece) in enumerate(zip(self.pieces, unit.pieces, strict=False)):
            if (found.file, found.first_row, found.rows) != (piece.name, piece.first_row, piece.row_count):
                wanted = f"rows {piece.first_row} to {piece.first_row + piece.row_count - 1} of {piece.name}"
                return f"its piece {number + 1} is {found}, not {wanted}"
            if (found.size, found.stamp) != (piece.size, piece.stamp):
                return f"it was made of another version of {piece.name}"
        if len(self.pieces) != len(unit.pieces):
            return f"it has {counted(len(self.pieces), 'piece')}, not {len(unit.pieces)}"
        return None


_OF_A_PIECE = frozenset(PieceRecord.model_fields) - {"rows"}
"""The keys that a record of version 1 has in place of `pieces`."""


class PartRecord(UnitRecord):
    """The record in a part's key-value metadata: which rows of which job it holds, and which attempt made it."""

    writer: str
    """A unique id of the attempt that made the part. An attempt that finds a part in its place sees from the id whether
    it wrote that part itself, in a call whose answer was lost, or another attempt did."""
    replica: str
    attempt: Count
    seconds: float
    """The seconds from when the replica had read the unit until it began to build the part."""
    published: str = ""
    """The time just before the publication, ISO 8601 in UTC by the replica's clock; "" in parts of earlier versions."""


class TotalsRecord(Record):
    """The totals of a part, kept in its key-value metadata beside its PartRecord. The fields are those of Totals."""

    rows: Count
    ok: Count
    errors: Count
    prompt_tokens: Count
    completion_tokens: Count
    denoiser_forwards: Count
    duplicate_ids: Count
    null_ids: Count
    degenerate: Count = 0
    finish_reasons: dict[str, Count]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.ok + self.errors == sum(self.finish_reasons.values()) == self.rows:
            raise ValueError(
                f"rows is {self.rows}, but ok is {self.ok}, errors is {self.errors}, and finish_reasons has "
                f"{sum(self.finish_reasons.values())}"
            )
        return self


class CommitRecord(TotalsRecord, PartRecord):
    """A unit's commit record: its part's PartRecord and totals, and the checksum and size of the part's bytes.

    `seconds` includes the publication if the attempt that made the part also wrote this record; otherwise it is the
    part's own value.
    """

    model_config = ConfigDict(extra="allow")  # so that `verify` can name keys that the part does not have

    sha256: str
    """The SHA-256 (hex) of the part's bytes."""
    part_bytes: Count


def now(timespec: str = "seconds") -> str:
    """Return the current time as ISO 8601 in UTC; `timespec`: its precision, as datetime.isoformat takes it."""
    return datetime.now(UTC).isoformat(timespec=timespec)


def to_json(value: Any) -> bytes:
    """Return the value as indented JSON in UTF-8, the format of all records that are files of their own."""
    return pydantic_core.to_json(value, indent=1) + b"\n"  # json.dumps takes seven times as long


def from_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object in these bytes as a dict whose fields are not checked.

    Raises NotOursError if they are not a JSON object, for example after an interrupted write.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotOursError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise NotOursError("not a JSON object")
    return value


def unit_fields(unit: WorkUnit, prompt_rules: int) -> dict[str, Any]:
    """Return the fields of a UnitRecord but the fingerprint. `prompt_rules`: the version of the rules of prompts."""
    pieces = (
        PieceRecord(
            file=piece.name, first_row=piece.first_row, rows=piece.row_count, size=piece.size, stamp=piece.stamp
        )
        for piece in unit.pieces
    )
    return {
        "unit": unit.id,
        "pieces": tuple(pieces),
        "rows": unit.row_count,
        "rules": RulesRecord(units=unit.rules, prompts=prompt_rules) if unit.rules > 1 else None,
        "schema_version": SCHEMA_VERSION,
    }


def read_part(source: pa.NativeFile) -> tuple[PartRecord, Totals]:
    """Return a part's record and totals from its footer; the data of its rows is not read.

    Raises NotOursError if the footer cannot be read or has no such record or totals, or if they do not give the number
    of rows in the file; OtherSchemaError if the record says that the part has another schema.
    """
    try:
        metadata = pq.read_metadata(source)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column name that is not UTF-8
        raise NotOursError(one_line(error)) from error
    pairs = metadata.metadata or {}
    stored = pairs.get(RECORD_KEY.encode(), b"")
    try:
        record = PartRecord.read(stored)
        totals = TotalsRecord.read(pairs[TOTALS_KEY.encode()])
    except (KeyError, NotOursError) as error:
        if (version := _schema_version(stored)) != SCHEMA_VERSION:
            raise OtherSchemaError(other_schema(version)) from error
        raise NotOursError("its footer has no unit record of this project") from error
    if record.schema_version != SCHEMA_VERSION:
        raise OtherSchemaError(other_schema(record.schema_version))
    if not record.rows == totals.rows == metadata.num_rows:
        raise NotOursError(f"it holds {counted(metadata.num_rows, 'row')}, its record says {record.rows}")
    return record, Totals(**totals.model_dump())


def _schema_version(data: bytes) -> int:
    """Return the schema version in a record that this version cannot read; SCHEMA_VERSION if it names none."""
    try:
        version = from_json(data).get("schema_version")
    except NotOursError:
        return SCHEMA_VERSION
    return version if isinstance(version, int) else SCHEMA_VERSION


def commit_record(record: PartRecord, result: UnitResult, part_bytes: int) -> dict[str, Any]:
    """Return the content of the commit record of a published part, as CommitRecord reads it."""
    fields = {**record.fields(), **asdict(result.totals)}
    return {**fields, "seconds": result.seconds, "sha256": result.sha256, "part_bytes": part_bytes}
