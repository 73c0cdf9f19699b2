"""Tests of `plan` with a calibration: it shows the hours and the cost of the remaining rows, or why there are none."""

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.calibration.results import record
from pipeline.calibration.results.estimate import Estimate, estimate
from pipeline.calibration.results.tables import MEASUREMENTS
from pipeline.calibration.run import measure
from pipeline.cli.plan_view import PlanView, view_plan
from pipeline.config.loader import load_job
from pipeline.core.errors import InputError
from pipeline.monitoring.progress import LineDisplay
from pipeline.planning.checkpoint import check_checkpoint
from pipeline.planning.plan import make_plan
from tests.pipeline.calibration.cases import FakeBench, FakeClock, job_file, setup_of


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a job file with a calibration beside its output. The calibration knows a price."""
    file = job_file(tmp_path_factory.mktemp("calibrated"))
    calibrate(file, price=3.0, currency="EUR")
    return file


def calibrate(file: Path, **options: Any) -> None:
    """Measure, and write the record that `calibrate` writes, without the report."""
    clock, setup = FakeClock(), setup_of(file, **options)
    with (file.parent / "log").open("w") as log:
        outcome = measure(setup, FakeBench(clock), LineDisplay(log), threading.Event(), clock)
    fields = record.outcome_fields(outcome.choice, setup.workload, setup.sample, "", (), ())
    identity = {**setup.identity, **record.of_replica(outcome.replica)}
    setup.folder.write_record(identity, outcome.replica, fields)


def previewed(file: Path, *overrides: str, calibration: str | None = None) -> PlanView:
    return view_plan(load_job(str(file), overrides), calibration)


def test_hours_and_cost_are_those_of_the_jobs_own_point(calibrated: Path) -> None:
    """The expected hours are 60 rows times the measured seconds per row. The job has two replicas."""
    found = previewed(calibrated).estimate
    assert isinstance(found, Estimate)
    assert found.point.name == "diffusion-g0.9-t16-r16"
    seconds = found.measured["tokens_per_row"] / found.measured["tokens_per_s"]
    assert found.replica_hours == pytest.approx(60 * seconds / 3600)
    assert found.money == pytest.approx(60 * seconds / 3600 * 3.0)
    assert (found.rows, found.replicas, found.currency, found.same_input, found.most) == (60, 2, "EUR", True, 1.0)
    said = "\n".join(previewed(calibrated).lines())
    assert "on 2 replicas, ± 2%" in said
    assert "by         threshold 0.9, 16 steps, 16 rows: " in said
    assert "with fake device (builtin:noise, float32)" in said


def test_the_number_of_replicas_and_the_row_limit_are_the_jobs(calibrated: Path) -> None:
    """The estimate uses the job's number of replicas. A row limit of auto means the limit that the calibration's
    replica had memory for."""
    one, auto = previewed(calibrated, "workers.replicas=auto"), previewed(calibrated, "engine.max_rows=auto")
    assert "on one replica" in "\n".join(one.lines())
    assert isinstance(auto.estimate, Estimate)
    assert auto.estimate.point.max_rows == 32
    ar = previewed(calibrated, "generation.mode=ar").estimate
    assert isinstance(ar, Estimate)
    assert ar.point.name == "ar-r16"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.dtype=bfloat16", 'dtype: "float32" -> "bfloat16"'),
        ("model.checkpoint=builtin:tiny", "checkpoint: "),
        ("generation.temperature=0.5", "generation.temperature: 0.0 -> 0.5"),
        ("generation.max_new_tokens=32", "generation.max_new_tokens: 64 -> 32"),
        ("engine.lanes=2", "engine.lanes: null -> 2"),
        ("workers.cpus=2", "workers.cpus: 1 -> 2"),
        ("generation.confidence_threshold=0.85", "has no point for threshold 0.85, 16 steps, 16 rows; measured: "),
        ("generation.mode=mock_ar", "has no point for mode mock_ar with max_rows 16; measured: "),
        ("engine.max_rows=8", "has no point for mode diffusion with max_rows 8; measured: "),
    ],
)
def test_nothing_is_extrapolated(calibrated: Path, override: str, reason: str) -> None:
    """If the model, a setting or the point differs from what was measured, `plan` shows the difference instead of
    hours."""
    shown = previewed(calibrated, override)
    assert isinstance(shown.estimate, str)
    assert reason in shown.estimate
    assert f"hours      unknown: {shown.estimate}" in list(shown.lines())


def test_rows_that_were_cut_earlier_make_it_a_lower_bound(tmp_path: Path) -> None:
    """The calibration allowed 16 new tokens and the job allows 64, and half of the rows were cut. The estimate says how
    much more the job can cost at most."""
    file = job_file(tmp_path)
    calibrate(file, max_new_tokens=16)
    table = tmp_path / "out-calibration" / "measurements.parquet"
    rows = [{**row, "length_share": 0.5, "tokens_per_row": 12.0} for row in pq.read_table(table).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, MEASUREMENTS), table)
    found = previewed(file).estimate
    assert isinstance(found, Estimate)
    assert found.price is None
    assert "cost       no price was given: " in "\n".join(found.lines())
    assert found.most == pytest.approx(1 + 0.5 * 48 / 12)
    assert "generated  about 720 tokens, at most 3.00 times that" in "\n".join(previewed(file).lines())


def test_a_named_folder_is_used_and_must_hold_a_calibration(calibrated: Path, tmp_path: Path) -> None:
    """The named calibration may have measured other rows; `plan` says so. If the folder holds no calibration, or
    damaged files, that is an error. A job without any calibration is no error."""
    other = job_file(tmp_path, rows=30)
    assert previewed(other).estimate is None
    there = f"{calibrated.parent}/out-calibration"
    found = previewed(other, calibration=there).estimate
    assert isinstance(found, Estimate)
    assert (found.rows, found.same_input) == (30, False)
    assert "measured on other input with" in "\n".join(found.lines())
    with pytest.raises(InputError, match=r"--calibration .* holds no calibration"):
        previewed(other, calibration=str(tmp_path / "none"))
    (tmp_path / "bad").mkdir()
    for name in ("calibration.json", "measurements.parquet"):
        (tmp_path / "bad" / name).write_text("{}")
    with pytest.raises(InputError, match="is no calibration that can be read"):
        previewed(other, calibration=str(tmp_path / "bad"))


def test_a_damaged_calibration_beside_the_output_is_no_obstacle_to_a_plan(tmp_path: Path) -> None:
    file = job_file(tmp_path)
    calibrate(file)
    (tmp_path / "out-calibration" / "measurements.parquet").write_bytes(b"PAR1")
    assert "is no calibration that can be read" in str(previewed(file).estimate)


def test_rows_that_are_done_or_bad_cost_nothing(tmp_path: Path) -> None:
    """Half of the sampled prompts are null, so the estimate counts half of the rows."""
    file = job_file(tmp_path, prompts=["a prompt", None] * 30)
    calibrate(file)
    found = previewed(file).estimate
    assert isinstance(found, Estimate)
    assert found.rows == 30
    job = load_job(str(file), ())
    identity = check_checkpoint(job).identity()
    nothing = estimate(job, make_plan(job, checkpoint_identity=identity), identity, None, 0)
    assert isinstance(nothing, Estimate)
    assert nothing.replica_hours == 0
