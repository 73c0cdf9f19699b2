"""Estimates the time and the cost of a job for `plan`, from a calibration with the same model and settings.

Nothing is extrapolated: there is no estimate if the two jobs differ in anything that speed depends on, or if the point
was not measured.
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
from pipeline.core.text import duration, one_line
from pipeline.output.records import NotOursError, from_json
from pipeline.planning.fingerprint import NAMED_AT_MOST, differences, digest_of
from pipeline.planning.plan import Plan
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

_LENGTH = "generation.max_new_tokens"


@dataclass(frozen=True, slots=True)
class Estimate:
    """The time and cost of the rows of a job that are left, estimated from the measurement of the job's own point."""

    point: Point
    measured: Mapping[str, Any]
    """The row of measurements.parquet for this point, by column."""
    rows: int
    """Estimated number of rows that are still to be generated: without finished and saved rows and the share of
    unusable rows."""
    replicas: int | None
    """Number of replicas; None means as many as fit."""
    gpus: int
    """GPUs per replica; 0 on CPUs."""
    price: float | None
    """Price of an hour of one GPU, or of one replica on CPUs; None if it is unknown."""
    currency: str
    same_input: bool
    """Whether the calibration measured the same input files."""
    most: float = 1.0
    """Factor by which tokens, hours and cost can be higher at most, because the calibration cut rows earlier than the
    job does; 1 if it did not."""

    @property
    def replica_hours(self) -> float:
        """Return the hours of all replicas together, without the loading of the model."""
        return float(self.rows * self.measured["seconds_per_row"] / 3600)

    @property
    def money(self) -> float | None:
        """Return the cost of the replica hours in `currency`, or None if no price is known."""
        return None if self.price is None else self.replica_hours * (self.gpus or 1) * self.price

    def lines(self) -> Iterator[str]:
        """Yield the lines that `plan` prints: tokens, hours, cost, and the measurement that they come from."""
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
        rate, length = f"{measured['tokens_per_s']:,.0f} tokens/s", f"{measured['tokens_per_row']:,.1f} tokens per row"
        what = f"{measured['device']} ({measured['checkpoint']}, {measured['dtype']})"
        yield f"by         {self.point.label}: {rate}, {length}, measured{of} with {what}"

    def _or_more(self) -> str:
        if self.most <= 1.005:
            return ""
        return f", at most {self.most:.2f} times that, like hours and cost, because the sample's rows were cut earlier"


def estimate(job: Job, plan: Plan, checkpoint_identity: str, folder: str | None, rows: int) -> Estimate | str | None:
    """Return the estimate for `rows` rows of the job, or the reason why there is none, or None if there is no
    calibration.

    `folder`: the folder of a calibration; None means the one that `calibrate` writes to by default. If a folder is
    named, this raises InputError if it holds no calibration or an unreadable one, StorageError if the storage fails. By
    default, these errors are returned as the reason.
    """
    where = default_folder(job) if folder is None else folder
    if where is None:
        return None
    try:
        found = _read(where)
    except (InputError, StorageError) as error:
        if folder is not None:
            raise
        return str(error)  # a plan does not need it, and the user may lack access to this folder
    if found is None and folder is not None:
        raise InputError(f"--calibration {safe_url(folder)} holds no calibration: `twotower calibrate` makes one")
    return None if found is None else _estimate(job, plan, checkpoint_identity, found, rows)


@dataclass(frozen=True, slots=True)
class _Calibration:
    """The content of a calibration's folder, as far as an estimate needs it."""

    shown: str
    """Path or URL of the folder, without credentials."""
    points: Mapping[Point, Mapping[str, Any]]
    """The measured points, each with its row of measurements.parquet."""
    identity: Mapping[str, Any]
    """The values that the measurements depend on, by name."""
    limits: Mapping[RowLimit, int]
    """Number of rows that each row limit meant on the replica."""
    workload: Mapping[str, Any]
    """The Workload as calibration.json has it; empty if no calibration was finished yet."""


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
        raise InputError(f"{shown} is no calibration that can be read: {one_line(error)}") from None


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
    """Return the points in measurements.parquet, each with its columns, without points that lack a time per row."""
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    return {tables.point_of(row)[0]: row for row in rows if row["seconds_per_row"] is not None}


def _unlike(job: Job, checkpoint_identity: str, identity: Mapping[str, Any]) -> str:
    """Return the differences between the job and the calibration in all values that speed and length depend on.

    The text is empty if there are none. A calibration with fewer new tokens than the job has is no difference.
    """
    here = record.of_settings(job, checkpoint_identity)
    if isinstance(length := identity.get(_LENGTH), int) and length <= here[_LENGTH]:
        here[_LENGTH] = length  # rows were cut earlier: Estimate.most says how much it may be too low
    found = differences({name: identity.get(name) for name in here}, here)
    more = f" and {len(found) - NAMED_AT_MOST} more" if len(found) > NAMED_AT_MOST else ""
    return ", ".join(found[:NAMED_AT_MOST]) + more


def _point_of(job: Job, rows: int | None) -> Point | None:
    """Return the point that the job runs at, with this row limit; None if `rows` is None or the mode is mock_ar."""
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
