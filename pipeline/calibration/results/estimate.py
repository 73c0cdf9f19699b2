"""What a job will take, by the calibration of a job with the same model and settings. Nothing is extrapolated: where
that job was another one in anything that speed depends on, or the point was not measured, there is no estimate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.calibration.bench import RowLimit
from pipeline.calibration.points import AR, Point, Setting
from pipeline.calibration.results import record, tables
from pipeline.calibration.results.folder import MEASUREMENTS, RECORD, default_folder
from pipeline.config.job import Job
from pipeline.core.errors import InputError, StorageError
from pipeline.core.text import duration
from pipeline.output.records import NotOursError, from_json
from pipeline.planning.fingerprint import NAMED_AT_MOST, differences, digest_of
from pipeline.planning.plan import Plan
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

_LENGTH = "generation.max_new_tokens"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point that was measured, and what it means for the rows that are left."""

    point: Point
    measured: Mapping[str, Any]
    """Its row of measurements.parquet."""
    rows: int
    """To be generated."""
    replicas: int | None
    """None: as many as fit."""
    gpus: int
    price: float | None
    """Of an hour of a GPU, or of a replica on CPUs; None: unknown."""
    currency: str
    same_input: bool
    most: float = 1.0
    """Factor by which all can be higher, where rows were cut earlier than the job cuts them."""

    @property
    def replica_hours(self) -> float:
        """Of all replicas together, loading not counted."""
        return float(self.rows * self.measured["seconds_per_row"] / 3600)

    @property
    def money(self) -> float | None:
        """Price of the replica_hours."""
        return None if self.price is None else self.replica_hours * (self.gpus or 1) * self.price

    def lines(self) -> Iterator[str]:
        """What an operator wants to know, a line each."""
        measured, hours = self.measured, self.replica_hours
        error = f", ± {2 * error:.0%}" if (error := measured["speed_error"] or 0.0) >= 0.005 else ""
        several = self.replicas is not None and self.replicas > 1
        yield f"generated  about {round(self.rows * measured['tokens_per_row']):,} tokens{self._or_more()}"
        where = f"on {self.replicas} replicas" if several else "on one replica"
        yield f"hours      about {duration(3600 * hours / (self.replicas or 1))} {where}{error}"
        amount = hours * (self.gpus or 1)
        money = "no price was given" if self.money is None else f"{self.money:,.2f} {self.currency}"
        yield f"cost       {money}: {amount:,.2f} {'GPU' if self.gpus else 'replica'}-hours"
        of = "" if self.same_input else " on other input"
        rate, length = f"{measured['tokens_per_s']:,.0f} tokens/s", f"{measured['tokens_per_row']:,.1f} tokens a row"
        what = f"{measured['device']} ({measured['checkpoint']}, {measured['dtype']})"
        yield f"by         {self.point.label}: {rate}, {length}, measured{of} with {what}"

    def _or_more(self) -> str:
        if self.most <= 1.005:
            return ""
        return f", at most {self.most:.2f} times that, and of hours and cost: the sample's rows were cut earlier"


def estimate(job: Job, plan: Plan, checkpoint_identity: str, folder: str | None, rows: int) -> Estimate | str | None:
    """What `rows` rows of the job take; or why that cannot be said; None where there is no calibration.

    folder: None looks where `calibrate` writes by default. Raises InputError and StorageError where a folder that was
    named holds no calibration, or one that cannot be read.
    """
    where = default_folder(job) if folder is None else folder
    if where is None:
        return None
    try:
        found = _read(where)
    except (InputError, StorageError) as error:
        if folder is not None:
            raise
        return str(error)  # a plan is of use without: whoever may read the output may not read beside it
    if found is None and folder is not None:
        raise InputError(f"--calibration {safe_url(folder)} holds no calibration: `twotower calibrate` makes one")
    return None if found is None else _estimate(job, plan, checkpoint_identity, found, rows)


@dataclass(frozen=True, slots=True)
class _Calibration:
    """What a folder holds."""

    shown: str
    points: Mapping[Point, Mapping[str, Any]]
    identity: Mapping[str, Any]
    limits: Mapping[RowLimit, int]
    workload: Mapping[str, Any]


def _read(folder: str) -> _Calibration | None:
    storage, shown = Storage(folder), safe_url(folder)
    data, table = storage.read_if_exists(RECORD), storage.read_if_exists(MEASUREMENTS)
    if data is None or table is None:
        return None
    try:
        fields = from_json(data)
        limits = dict(record.replica_from(fields["replica"]).row_limits)
        return _Calibration(shown, _points(table), dict(fields["measured_with"]), limits, dict(fields.get("job") or {}))
    except (NotOursError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{shown} is no calibration that can be read: {' '.join(str(error).split())}") from None


def _estimate(job: Job, plan: Plan, checkpoint_identity: str, found: _Calibration, rows: int) -> Estimate | str:
    if unlike := _unlike(job, checkpoint_identity, found.identity):
        return f"{found.shown} was measured with another job (there -> here): {unlike}; calibrate this one"
    point = _point_of(job, found.limits.get(job.engine.max_rows))
    if point is None or point not in found.points:
        return f"{found.shown} has no point for {_wanted(job, point)}; measured: {_named(found.points)}"
    measured = found.points[point]
    longer = job.generation.max_new_tokens - int(found.identity[_LENGTH])
    tokens, cut = measured["tokens_per_row"] or 0.0, measured["length_share"] or 0.0
    return Estimate(
        point,
        measured,
        rows,
        replicas=None if job.workers.replicas == "auto" else int(job.workers.replicas),
        gpus=job.workers.gpus,
        price=found.workload.get("price"),
        currency=str(found.workload.get("currency", "")),
        same_input=found.identity.get("input files") == digest_of(plan.listing),
        most=1 + cut * longer / tokens if tokens else 1.0,
    )


def _points(data: bytes) -> dict[Point, dict[str, Any]]:
    """Points whose quality was measured as well: without it the length of their rows is unknown."""
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    return {tables.point_of(row)[0]: row for row in rows if row["seconds_per_row"] is not None}


def _unlike(job: Job, checkpoint_identity: str, identity: Mapping[str, Any]) -> str:
    """What differs of all that speed and length depend on; "" where nothing does."""
    here = record.of_settings(job, checkpoint_identity)
    if isinstance(length := identity.get(_LENGTH), int) and length <= here[_LENGTH]:
        here[_LENGTH] = length  # rows that were cut earlier: the estimate says by how much it may be too low
    found = differences({name: identity.get(name) for name in here}, here)
    more = f" and {len(found) - NAMED_AT_MOST} more" if len(found) > NAMED_AT_MOST else ""
    return ", ".join(found[:NAMED_AT_MOST]) + more


def _point_of(job: Job, rows: int | None) -> Point | None:
    """The job's own point; None where the calibration's replica did not try its row limit, or its mode has none."""
    generation = job.generation
    if rows is None or generation.mode == "mock_ar":
        return None
    if generation.mode == "ar":
        return Point(AR, rows)
    return Point(Setting("diffusion", generation.confidence_threshold, generation.steps_per_block), rows)


def _wanted(job: Job, point: Point | None) -> str:
    return point.label if point is not None else f"mode {job.generation.mode} with max_rows {job.engine.max_rows}"


def _named(points: Mapping[Point, Any]) -> str:
    named = [point.label for point in points]
    more = f"; and {len(named) - NAMED_AT_MOST} more" if len(named) > NAMED_AT_MOST else ""
    return "; ".join(named[:NAMED_AT_MOST]) + more if named else "none"
