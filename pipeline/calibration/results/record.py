"""Makes the content of calibration.json: what the measurements depend on, and the outcome, for people and for
`plan`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.calibration.bench import Replica, RowLimit
from pipeline.calibration.choice import Choice, Result, Workload, cost_of
from pipeline.calibration.points import Point
from pipeline.calibration.results import tables
from pipeline.calibration.sample import Sample
from pipeline.config.job import Job
from pipeline.planning.fingerprint import digest_of
from pipeline.planning.plan import Plan
from pipeline.storage.urls import safe_url

_VARIED = {"mode", "confidence_threshold", "steps_per_block", "on_degenerate"}
"""Generation settings that the points vary, or that the measurements do not depend on."""


def identity(measured: Job, plan: Plan, sample: Sample, checkpoint_identity: str) -> dict[str, Any]:
    """Return all values that the measurements depend on, as JSON values by name, except those of `of_replica`.

    A calibration is continued only if all of these are the same.
    """
    return {
        "input files": digest_of(plan.listing),
        "sample rows": len(sample.rows),
        "sample": digest_of([[row.key, *row.prompt_ids] for row in sample.rows]),
        **of_settings(measured, checkpoint_identity),
    }


def of_settings(measured: Job, checkpoint_identity: str) -> dict[str, Any]:
    """Return the values that measurements depend on and that a job's settings and checkpoint determine, by name.

    This is the part of `identity` without the input files and the sample.
    """
    generation = measured.generation.model_dump(mode="json", exclude=_VARIED)
    engine = measured.engine.model_dump(mode="json", exclude={"max_rows"})
    return {
        "checkpoint": checkpoint_identity,
        "dtype": measured.model.dtype,
        **{f"generation.{key}": value for key, value in generation.items()},
        **{f"engine.{key}": value for key, value in engine.items()},
        "input.row_settings": measured.input.row_settings.columns,
        "workers.gpus": measured.workers.gpus,
        "workers.cpus": measured.workers.cpus,
    }


def of_replica(replica: Replica) -> dict[str, Any]:
    """Return the values that measurements depend on and that only a started replica knows: its device and versions."""
    return {"device": replica.device, **dict(replica.versions)}


def replica_from(fields: Mapping[str, Any]) -> Replica:
    """Return the Replica that these fields of calibration.json describe. Raises LookupError, TypeError or ValueError if
    they do not describe one."""

    def pairs(name: str) -> Any:
        return tuple((first, second) for first, second in fields[name])

    return Replica(str(fields["device"]), pairs("row_limits"), pairs("refused"), pairs("versions"))


def shared_columns(measured: Job, replica: Replica) -> dict[str, Any]:
    """Return the columns of measurements.parquet that are the same in all rows: checkpoint, device, versions,
    settings."""
    versions, generation = dict(replica.versions), measured.generation
    return {
        "checkpoint": safe_url(measured.model.checkpoint),
        "dtype": measured.model.dtype,
        "device": replica.device,
        "version": versions.get("twotower"),
        "torch": versions.get("torch"),
        "temperature": generation.temperature,
        "block_size": generation.block_size,
        "max_new_tokens": generation.max_new_tokens,
    }


def measurements(choice: Choice, workload: Workload, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of measurements.parquet, in the order in which the points were measured."""
    return [tables.measurement(result, workload, choice.best, shared) for result in choice.results]


def outcome_fields(
    choice: Choice,
    workload: Workload,
    sample: Sample,
    verdict: str,
    notes: Sequence[str],
    missing: Sequence[tuple[Point, str]],
) -> dict[str, Any]:
    """Return the fields of calibration.json that describe the outcome: the choice, its cost, and how it was found.

    `verdict`, `notes`: the texts in the report. `missing`: points that were not measured, each with the reason.
    """
    return {
        "verdict": verdict,
        "notes": list(notes),
        "chosen": _result_fields(choice.best, workload),
        "ar": _result_fields(choice.reference, workload),
        "speedup": round(choice.speedup, 4),
        "min_agreement": choice.min_agreement,
        "job": asdict(workload),
        "sample_drawn": {
            "rows": len(sample.rows),
            "read": sample.read,
            "bad": sample.bad,
            "reasons": dict(sample.reasons),
            "strata": [asdict(stratum) for stratum in sample.strata],
        },
        "points": len(choice.results),
        "not_measured": {point.name: why for point, why in missing},
    }


def _result_fields(result: Result, workload: Workload) -> dict[str, Any]:
    cost, quality, setting = cost_of(result, workload), result.quality, result.point.setting
    return {
        "point": result.point.name,
        "mode": setting.mode,
        "confidence_threshold": setting.threshold,
        "steps_per_block": setting.steps,
        "max_rows": result.point.max_rows,
        "tokens_per_s": result.speed.tokens_per_s,
        "speed_error": result.speed.error,
        "tokens_per_row": quality.tokens_per_row,
        "seconds_per_row": result.seconds_per_row,
        "agreement": [quality.agreement.mean, quality.agreement.low, quality.agreement.high],
        "exact_match": [quality.exact.mean, quality.exact.low, quality.exact.high],
        "repetition": quality.repetition,
        "tokens_per_forward": quality.tokens_per_forward,
        "replica_hours": cost.replica_hours,
        "hours": cost.hours,
        "gpu_hours": cost.gpu_hours,
        "cost": cost.money,
        "at_most_times": cost.most,
        "measured_at": result.measured_at,
    }


def limit_name(limit: RowLimit) -> str:
    """Return the row limit as the option --rows writes it: a number, or `max` for `auto`."""
    return "max" if limit == "auto" else str(limit)
