"""Defines the tables of a calibration, measurements.parquet and completions/*.parquet, and converts their rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.calibration.bench import Speed
from pipeline.calibration.choice import Result, Workload, cost_of
from pipeline.calibration.points import Point, Setting
from pipeline.calibration.quality import Answer, Answers
from pipeline.calibration.sample import SampleRow

_Columns = tuple[tuple[str, pa.DataType], ...]
_MEASUREMENTS: _Columns = (
    ("point", pa.string()),
    ("mode", pa.string()),
    ("confidence_threshold", pa.float64()),  # null in AR mode, like steps_per_block
    ("steps_per_block", pa.int32()),
    ("max_rows", pa.int32()),
    ("tokens_per_s", pa.float64()),  # completion tokens/s of one replica while all its slots are taken
    ("speed_error", pa.float64()),  # standard error of tokens_per_s, as a share of it
    ("window_s", pa.float64()),
    ("window_tokens", pa.int64()),
    ("window_rows", pa.int64()),
    ("seconds", pa.float64()),  # time that measuring the point took (see Speed.seconds)
    ("measured_at", pa.string()),
    ("rows", pa.int32()),  # rows of the sample; from here to error_share: the setting at the largest row limit
    ("agreement", pa.float64()),  # mean similarity of the greedy tokens to AR's
    ("agreement_low", pa.float64()),  # low end of the 95% interval of the agreement
    ("agreement_high", pa.float64()),
    ("exact_match", pa.float64()),  # share of greedy texts that are exactly AR's
    ("exact_match_low", pa.float64()),
    ("exact_match_high", pa.float64()),
    ("repetition", pa.float64()),
    ("tokens_per_forward", pa.float64()),
    ("mean_steps_per_block", pa.float64()),
    ("tokens_per_row", pa.float64()),
    ("prompt_tokens_per_row", pa.float64()),
    ("stop_share", pa.float64()),
    ("length_share", pa.float64()),
    ("error_share", pa.float64()),
    ("seconds_per_row", pa.float64()),  # mean of one replica with all slots taken
    ("replica_hours", pa.float64()),  # from here to currency: the cost of the whole job
    ("gpu_hours", pa.float64()),
    ("cost", pa.float64()),
    ("currency", pa.string()),
    ("chosen", pa.bool_()),
    # these are the same in every row, so that files of several calibrations can be read together
    ("checkpoint", pa.string()),
    ("dtype", pa.string()),
    ("device", pa.string()),
    ("version", pa.string()),
    ("torch", pa.string()),
    ("temperature", pa.float64()),
    ("block_size", pa.int32()),
    ("max_new_tokens", pa.int32()),
)
_ANSWERS: _Columns = (
    ("key", pa.string()),  # <source_file>#<source_row>
    ("id", pa.string()),
    ("greedy", pa.bool_()),  # true: at temperature 0, to compare with AR; false: as the job samples
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("token_ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()),
    ("error", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("denoiser_forwards", pa.int32()),
    ("steps_per_block", pa.list_(pa.int32())),
    ("repetition", pa.float64()),
)
MEASUREMENTS = pa.schema([pa.field(name, kind) for name, kind in _MEASUREMENTS])
ANSWERS = pa.schema([pa.field(name, kind) for name, kind in _ANSWERS])


def measurement(result: Result, workload: Workload, best: Result, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of MEASUREMENTS for a result. `shared`: the columns that are the same in all rows.

    The row is marked as chosen if `result` is `best` itself.
    """
    quality, cost = result.quality, cost_of(result, workload)
    return {
        **point_columns(result.point, result.speed, result.measured_at),
        "rows": len(quality.similarities),
        "agreement": quality.agreement.mean,
        "agreement_low": quality.agreement.low,
        "agreement_high": quality.agreement.high,
        "exact_match": quality.exact.mean,
        "exact_match_low": quality.exact.low,
        "exact_match_high": quality.exact.high,
        "repetition": quality.repetition,
        "tokens_per_forward": quality.tokens_per_forward,
        "mean_steps_per_block": quality.steps_per_block,
        "tokens_per_row": quality.tokens_per_row,
        "prompt_tokens_per_row": quality.prompt_tokens_per_row,
        "stop_share": quality.stopped,
        "length_share": quality.cut,
        "error_share": quality.errors,
        "seconds_per_row": result.seconds_per_row,
        "replica_hours": cost.replica_hours,
        "gpu_hours": cost.gpu_hours,
        "cost": cost.money,
        "currency": None if cost.money is None else workload.currency,
        "chosen": result is best,
        **shared,
    }


def point_columns(point: Point, speed: Speed, measured_at: str) -> dict[str, Any]:
    """Return the columns of MEASUREMENTS for a point, its speed and the time of its measurement; see `point_of`."""
    return {
        "point": point.name,
        "mode": point.setting.mode,
        "confidence_threshold": point.setting.threshold,
        "steps_per_block": point.setting.steps,
        "max_rows": point.max_rows,
        "tokens_per_s": speed.tokens_per_s,
        "speed_error": speed.error,
        "window_s": speed.window_s,
        "window_tokens": speed.window_tokens,
        "window_rows": speed.window_rows,
        "seconds": speed.seconds,
        "measured_at": measured_at,
    }


def point_of(columns: Mapping[str, Any]) -> tuple[Point, tuple[Speed, str]]:
    """Return (point, (speed, time of the measurement)) of a row of MEASUREMENTS. Raises KeyError if a column is
    missing."""
    setting = Setting(columns["mode"], columns["confidence_threshold"], columns["steps_per_block"])
    speed = Speed(
        tokens_per_s=columns["tokens_per_s"],
        error=columns["speed_error"],
        window_s=columns["window_s"],
        window_tokens=columns["window_tokens"],
        window_rows=columns["window_rows"],
        seconds=columns["seconds"],
    )
    return Point(setting, columns["max_rows"]), (speed, columns["measured_at"])


def answers_table(rows: Sequence[SampleRow], answers: Answers) -> pa.Table:
    """Return the answers of a setting to the rows of the sample as a table with the columns of ANSWERS.

    A row of the sample has one row in the table, or two if the job samples: greedy, and as the job samples.
    """
    columns = list(_answer_rows(rows, answers.greedy, greedy=True))
    if answers.rows is not answers.greedy:
        columns += _answer_rows(rows, answers.rows, greedy=False)
    return pa.Table.from_pylist(columns, schema=ANSWERS)


def answers_of(table: pa.Table, rows: Sequence[SampleRow]) -> Answers:
    """Return the answers to the rows of the sample from a table with the columns of ANSWERS.

    Raises KeyError if a row or a column is missing.
    """
    found: dict[bool, dict[str, Answer]] = {True: {}, False: {}}
    for columns in table.to_pylist():
        found[columns["greedy"]][columns["key"]] = _answer_of(columns)
    greedy = tuple(found[True][row.key] for row in rows)
    return Answers(tuple(found[False][row.key] for row in rows) if found[False] else greedy, greedy)


def _answer_rows(rows: Sequence[SampleRow], answers: Sequence[Answer], *, greedy: bool) -> Iterator[dict[str, Any]]:
    for row, answer in zip(rows, answers, strict=True):
        yield {
            "key": row.key,
            "id": row.id,
            "greedy": greedy,
            "prompt": row.prompt,
            "completion": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "error": answer.error,
            "prompt_tokens": answer.prompt_tokens,
            "denoiser_forwards": answer.denoiser_forwards,
            "steps_per_block": answer.steps_per_block,
            "repetition": answer.repetition,
        }


def _answer_of(columns: Mapping[str, Any]) -> Answer:
    return Answer(
        text=columns["completion"],
        token_ids=tuple(columns["token_ids"]),
        finish_reason=columns["finish_reason"],
        error=columns["error"],
        prompt_tokens=columns["prompt_tokens"],
        denoiser_forwards=columns["denoiser_forwards"],
        steps_per_block=tuple(columns["steps_per_block"]),
        repetition=columns["repetition"],
    )
