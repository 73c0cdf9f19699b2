"""Tests of a calibration from job file to report, with a fake bench: order, time limit, resume, files and refusals."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.calibration.bench import Task
from pipeline.calibration.finish import finish
from pipeline.calibration.options import Options, numbers, row_limits, whole_numbers
from pipeline.calibration.page.content import make_report
from pipeline.calibration.points import AR, Point, Setting
from pipeline.calibration.results import tables
from pipeline.calibration.run import Outcome, measure
from pipeline.calibration.setup import Setup
from pipeline.config.loader import load_job
from pipeline.core.errors import CheckpointError, InputError, JobError, JobFailed, OutputError
from pipeline.monitoring.progress import LineDisplay
from pipeline.storage.storage import Storage
from tests.pipeline.calibration.cases import JOB, MAX_ROWS, FakeBench, job_file, setup_of
from tests.pipeline.cases import load

OWN = Point(Setting("diffusion", 0.9, 16), 16)
POINTS = 3 * (1 + 2 * 2)
"""The number of points: AR and a grid of 2 x 2 settings, each at 1, 16 (the job's limit) and 32 rows (the maximum)."""


def run(setup: Setup, bench: FakeBench, stop: threading.Event | None = None, out: io.StringIO | None = None) -> Outcome:
    return measure(setup, bench, LineDisplay(out or io.StringIO()), stop or threading.Event(), bench.clock)


def names(bench: FakeBench) -> list[str]:
    return [task.point.name for task in bench.measured]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing of the report: it is slow, and has tests of its own."""
    monkeypatch.setattr("pipeline.calibration.finish.make_report", lambda _: b"<html></html>")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return job_file(tmp_path)


def test_all_is_measured_and_written(file: Path) -> None:
    bench, out = FakeBench(), io.StringIO()
    setup = setup_of(file)
    outcome = run(setup, bench, out=out)
    lines = finish(outcome, str(file), [])
    folder = file.parent / "out-calibration"
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    settings = ["ar", *(f"diffusion-g{g}-t{t}" for g in (0.8, 0.9) for t in (16, 4))]
    assert written == sorted(
        ["calibration.json", "job.yaml", "measurements.parquet", "report.html"]
        + [f"completions/{name}.parquet" for name in settings]
    )
    assert len(bench.measured) == len(outcome.choice.results) == POINTS
    assert [task.whole for task in bench.measured] == [task.point.max_rows == MAX_ROWS for task in bench.measured]
    assert names(bench)[:4] == ["ar-r32", "diffusion-g0.9-t16-r32", "ar-r16", OWN.name]
    assert bench.closed
    assert out.getvalue().splitlines()[1] == "1 of 15: AR, 32 rows"
    assert any(line.startswith("* ") for line in lines)
    assert lines[-1].endswith("out-calibration/report.html, measurements.parquet, completions/")


def test_the_measurements_are_a_table_of_all_points(file: Path) -> None:
    outcome = run(setup_of(file, price=0.5), FakeBench())
    table = pq.read_table(file.parent / "out-calibration/measurements.parquet")
    assert table.schema.equals(tables.MEASUREMENTS)
    rows = table.to_pylist()
    assert len({row["point"] for row in rows}) == POINTS
    [best] = [row for row in rows if row["chosen"]]
    assert best["point"] == outcome.choice.best.point.name
    assert best["tokens_per_s"] == max(row["tokens_per_s"] for row in rows if row["agreement"] >= 0.95)
    assert best["seconds_per_row"] == pytest.approx(best["tokens_per_row"] / best["tokens_per_s"])
    assert best["replica_hours"] == pytest.approx(60 * best["seconds_per_row"] / 3600)
    assert best["cost"] == pytest.approx(0.5 * best["replica_hours"])
    ar = [row for row in rows if row["mode"] == "ar"]
    assert [row["agreement"] for row in ar] == [1.0] * 3
    assert {row["agreement"] for row in rows if row["confidence_threshold"] == 0.8 and row["steps_per_block"] == 4} == {
        min(row["agreement"] for row in rows)  # agreement belongs to a setting: it is the same at every row limit
    }
    assert {(row["device"], row["version"], row["rows"]) for row in rows} == {("fake device", "1", 24)}


def test_the_record_says_what_plan_needs(file: Path) -> None:
    outcome = run(setup_of(file), FakeBench())
    finish(outcome, str(file), [])
    record = load(file.parent / "out-calibration/calibration.json")
    best = outcome.choice.best
    assert record["chosen"]["tokens_per_s"] == best.speed.tokens_per_s
    assert record["chosen"]["tokens_per_row"] == best.quality.tokens_per_row
    assert record["job"]["rows"] == 60
    assert record["speedup"] == pytest.approx(outcome.choice.speedup, abs=1e-4)
    assert record["measured_with"]["checkpoint"]
    assert record["not_measured"] == {}


def test_the_job_file_is_the_users_with_the_chosen_point(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run(setup_of(file, ["engine.extend_every=3"]), FakeBench())
    finish(outcome, str(file), ["engine.extend_every=3"])
    made = file.parent / "out-calibration/job.yaml"
    text, best = made.read_text(), outcome.choice.best.point
    assert text.startswith("# Made by `twotower calibrate ")
    assert 'path: "${CASE_OUT:-' in text  # variables stay variables, so that no secret is written into the new file
    new, old = load_job(made), load_job(file, ["engine.extend_every=3"])
    assert new.generation.confidence_threshold == best.setting.threshold
    assert new.generation.steps_per_block == best.setting.steps
    assert new.engine.max_rows == best.max_rows
    chosen = {"generation": {"confidence_threshold", "steps_per_block", "mode"}, "engine": {"max_rows"}}
    assert new.model_dump(exclude=chosen) == old.model_dump(exclude=chosen)
    assert list(yaml.safe_load(text)) == list(yaml.safe_load(file.read_text()))
    monkeypatch.setenv("CASE_OUT", "/elsewhere")
    assert load_job(made).output.path == "/elsewhere/out"


def test_a_job_file_with_an_old_key_becomes_one_with_todays(tmp_path: Path) -> None:
    """The section `checkpoint` of the old file is named `flush` in the new one. The same calibration serves both files,
    because it does not depend on that section."""
    file = job_file(tmp_path, text=JOB + "checkpoint: {{rows: 7}}\n")
    finish(run(setup_of(file), FakeBench()), str(file), ["flush.seconds=5"])
    made = tmp_path / "out-calibration/job.yaml"
    assert yaml.safe_load(made.read_text())["flush"] == {"rows": 7, "seconds": 5}
    assert load_job(made).flush == load_job(file, ["checkpoint.seconds=5"]).flush
    file.write_text(file.read_text().replace("checkpoint: {rows", "flush: {rows"))
    again = FakeBench()
    run(setup_of(file), again)
    assert again.measured == []


def test_where_ar_is_faster_the_job_file_says_ar(tmp_path: Path) -> None:
    file = job_file(tmp_path, text=JOB.replace("max_rows: 16", "max_rows: auto").replace("name: small\n", ""))
    lines = finish(run(setup_of(file), FakeBench(speedup=0.4)), str(file), [])
    assert any(line.startswith("AR alone is faster for this workload: ") for line in lines)
    made = load_job(tmp_path / "out-calibration/job.yaml")
    assert (made.generation.mode, made.engine.max_rows, made.name) == ("ar", "auto", "small")
    assert made.generation.confidence_threshold == 0.9


def test_a_job_in_ar_mode_is_compared_too(tmp_path: Path) -> None:
    file = job_file(tmp_path, text=JOB.replace("generation:\n", "generation:\n  mode: ar\n"))
    finish(run(setup_of(file), FakeBench()), str(file), [])
    assert load_job(tmp_path / "out-calibration/job.yaml").generation.mode == "diffusion"


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(file: Path) -> None:
    stop = threading.Event()
    first = FakeBench(before=lambda task: stop.set() if task.point.name == "ar-r1" else None)
    outcome = run(setup_of(file), first, stop)
    assert outcome.stopped
    assert 0 < len(outcome.choice.results) < POINTS
    assert {why for _, why in outcome.missing} == {
        "stopped while it was measured",
        "not begun before the end of the calibration",
    }
    finish(outcome, str(file), [])
    assert len(load(file.parent / "out-calibration/calibration.json")["not_measured"]) == len(outcome.missing)
    assert f"Not measured: {len(outcome.missing)} of {POINTS} points" in make_report(outcome).decode()
    second = FakeBench()
    outcome = run(setup_of(file), second)
    assert sorted(names(first) + names(second)) == sorted(point.point.name for point in outcome.choice.results)
    assert len(outcome.choice.results) == POINTS
    assert outcome.kept == len(names(first))
    answers = Storage(str(file.parent / "out-calibration/completions")).list_files("", "*.parquet")
    assert len(answers) == 5


def test_another_choice_of_what_is_there_needs_no_replica(file: Path) -> None:
    first = run(setup_of(file), FakeBench())
    finish(first, str(file), [])
    record = file.parent / "out-calibration/calibration.json"
    bench = FakeBench()
    second = run(setup_of(file, min_agreement=1.0, price=9.0, rows=(1,)), bench)
    assert not bench.rows
    assert second.choice.best.point.setting == AR != first.choice.best.point.setting
    assert load(record)["chosen"]["mode"] == "diffusion"
    finish(second, str(file), [])
    assert load(record)["chosen"]["mode"] == "ar"
    assert len(second.choice.results) == POINTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "options", "differs"),
    [
        (["generation.seed=3"], {}, "generation.seed: 0 -> 3"),
        (["model.dtype=bfloat16"], {}, 'dtype: "float32" -> "bfloat16"'),
        ([], {"sample": 20}, "sample rows: 24 -> 20"),
        ([], {"max_new_tokens": 32}, "generation.max_new_tokens: 64 -> 32"),
        (["engine.lanes=1"], {}, "engine.lanes: null -> 1"),
    ],
)
def test_a_folder_of_another_calibration_is_refused(
    file: Path, overrides: list[str], options: dict[str, Any], differs: str
) -> None:
    run(setup_of(file), FakeBench())
    with pytest.raises(OutputError, match="measured otherwise") as error:
        setup_of(file, overrides, **options)
    assert differs in str(error.value)


def test_another_device_is_another_calibration(file: Path) -> None:
    run(setup_of(file), FakeBench())
    (file.parent / "out-calibration/measurements.parquet").unlink()
    with pytest.raises(OutputError, match='device: "fake device" -> "another"'):
        run(setup_of(file), FakeBench(device="another"))


def test_a_changed_input_is_another_calibration(file: Path) -> None:
    run(setup_of(file), FakeBench())
    job_file(file.parent, rows=61)
    with pytest.raises(OutputError, match="input files: "):
        setup_of(file)


@pytest.mark.slow
def test_a_damaged_file_is_named(file: Path) -> None:
    run(setup_of(file), FakeBench())
    folder = file.parent / "out-calibration"
    (folder / "completions/ar.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match=r"completions/ar\.parquet cannot be read: .*; move the file away"):
        run(setup_of(file), FakeBench())
    (folder / "completions/ar.parquet").unlink()
    bench = FakeBench()
    run(setup_of(file), bench)
    assert len(bench.measured) == POINTS  # without AR nothing can be compared, so all points are measured again
    (folder / "calibration.json").write_text("{")
    with pytest.raises(OutputError, match=r"calibration\.json cannot be read"):
        setup_of(file)


def test_a_point_that_does_not_fit_into_the_time_is_not_begun(file: Path) -> None:
    """Each point takes 10 s, so six points fit into 65 s."""
    bench = FakeBench()
    outcome = run(setup_of(file, minutes=65 / 60), bench)
    assert len(bench.measured) == 6
    assert bench.clock.now == 60
    assert {why for _, why in outcome.missing} <= {
        "the time limit (--minutes)",
        "its setting was not measured at the largest row limit",
    }
    assert len(outcome.missing) == POINTS - 6


def test_a_point_that_takes_longer_than_the_time_left_is_given_up(file: Path) -> None:
    slow = "diffusion-g0.9-t16-r32"

    def before(task: Task) -> None:
        bench.seconds = 1000.0 if task.point.name == slow else 10.0

    bench = FakeBench(before=before)
    outcome = run(setup_of(file, minutes=1), bench)
    assert [result.point.name for result in outcome.choice.results] == ["ar-r32"]
    assert dict(outcome.missing)[Point(Setting("diffusion", 0.9, 16), 32)] == "the time limit (--minutes)"


def test_where_not_even_ar_fits_into_the_time_that_is_an_error(file: Path) -> None:
    with pytest.raises(JobFailed, match=r"AR alone over 24 rows takes longer than --minutes 0\.1: raise it, or lower"):
        run(setup_of(file, minutes=0.1), FakeBench())
    assert not (file.parent / "out-calibration/measurements.parquet").exists()


def test_a_replica_that_dies_leaves_what_was_measured(file: Path) -> None:
    outcome = run(setup_of(file), FakeBench(dies_at="ar-r1"))
    assert outcome.failure == "the replica died: killed"
    assert len(outcome.choice.results) > 4
    finish(outcome, str(file), [])
    with pytest.raises(JobFailed, match="AR could not be measured: the replica died"):
        run(setup_of(job_file(file.parent / "b")), FakeBench(dies_at="ar-r32"))


def test_row_limits_without_memory_are_left_out(file: Path) -> None:
    out = io.StringIO()
    outcome = run(setup_of(file, rows=(16, 9999)), FakeBench(), out=out)
    assert "row limit 9999 is left out: no memory" in out.getvalue()
    assert {result.point.max_rows for result in outcome.choice.results} == {16}
    ran_out = tuple(f"{setting}-r32" for setting in ("ar", "diffusion-g0.9-t16"))
    outcome = run(setup_of(job_file(file.parent / "b")), FakeBench(full=ran_out))
    assert [result.point.name for result in outcome.choice.results if result.point.setting == AR] == ["ar-r16", "ar-r1"]
    assert len(outcome.choice.results) == POINTS * 2 / 3
    assert {why for _, why in outcome.missing} == {"memory ran out with so many rows"}
    with pytest.raises(JobError, match="none of the row limits fits: no memory"):
        run(setup_of(job_file(file.parent / "c"), ["engine.max_rows=9999"], rows=(9999,)), FakeBench())


@pytest.mark.slow
def test_a_job_that_samples_is_compared_at_temperature_0(tmp_path: Path) -> None:
    file = job_file(tmp_path)
    outcome = run(setup_of(file, ["generation.temperature=0.7"]), FakeBench())
    answers = outcome.answers[AR]
    assert answers.rows[0].text == f"{answers.greedy[0].text}!"
    finish(outcome, str(file), ["generation.temperature=0.7"])
    table = pq.read_table(tmp_path / "out-calibration/completions/ar.parquet")
    greedy: list[Any] = table["greedy"].to_pylist()
    assert sorted(greedy) == [False] * 24 + [True] * 24
    assert "The job samples (temperature 0.7)" in make_report(outcome).decode()
    again = run(setup_of(file, ["generation.temperature=0.7"]), FakeBench())
    assert again.answers == outcome.answers


def test_a_lower_max_new_tokens_is_said(file: Path) -> None:
    setup = setup_of(file, max_new_tokens=32)
    lines = finish(run(setup, FakeBench()), str(file), [])
    assert any("Rows were cut at 32 tokens (--max-new-tokens), the job allows 64" in line for line in lines)
    assert load_job(file.parent / "out-calibration/job.yaml").generation.max_new_tokens == 64


def test_it_works_on_a_store(tmp_path: Path) -> None:
    file = job_file(tmp_path)
    setup = setup_of(file, to="memory://calibrations/one")
    lines = finish(run(setup, FakeBench()), str(file), [])
    stored = Storage("memory://calibrations/one")
    assert json.loads(stored.read("calibration.json"))["chosen"]["mode"] == "diffusion"
    assert b"</html>" in stored.read("report.html")
    assert any("copy it to a local file" in line for line in lines)
    assert run(setup_of(file, to="memory://calibrations/one"), FakeBench()).kept == POINTS


@pytest.mark.parametrize(
    ("to", "text"),
    [
        ("{folder}/out/x", "lies inside output"),
        ("{folder}/in/x", "lies inside input"),
        ("{folder}/full", "is not empty and holds no calibration"),
        ("{folder}/a*b", "readers take"),
        (" ", "--to is empty: name a folder"),
    ],
)
def test_folders_where_its_files_would_do_harm_are_refused(file: Path, to: str, text: str) -> None:
    (file.parent / "full").mkdir()
    (file.parent / "full/mine.txt").write_text("mine")
    with pytest.raises((JobError, InputError, OutputError), match=text):
        setup_of(file, to=to.format(folder=file.parent))


def test_a_bucket_has_nothing_beside_it(file: Path) -> None:
    with pytest.raises(JobError, match="has nothing beside it: name a folder with --to"):
        setup_of(file, ["output.path=s3://bucket/"])


def test_a_relative_folder_in_a_ray_job_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getcwd", lambda: "/tmp/ray/session/runtime_resources/working_dir_files/x")
    with pytest.raises(JobError, match="--to here is relative to Ray's temporary copy"):
        setup_of(file, to="here")


def test_a_checkpoint_without_a_denoiser_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_job: Any) -> Any:
        raise CheckpointError("2 tensors are missing")

    monkeypatch.setattr("pipeline.calibration.setup.check_checkpoint", check)
    file = job_file(tmp_path, text=JOB.replace("generation:\n", "generation:\n  mode: ar\n"))
    with pytest.raises(CheckpointError, match="compares AR with diffusion and needs both towers: 2 tensors"):
        setup_of(file)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sample": 0}, "--sample 0: it must be a whole number of at least 1"),
        ({"minutes": 0.0}, "--minutes 0.0: it must be a number above 0"),
        ({"thresholds": (1.5,)}, "--thresholds 1.5: it must be numbers from 0 to 1"),
        ({"steps": (0, 4)}, "--steps 0,4: it must be whole numbers of at least 1"),
        ({"rows": (0,)}, "--rows 0: it must be whole numbers of at least 1, or max"),
        ({"min_agreement": 2.0}, "--min-agreement 2.0: it must be a share from 0 to 1"),
        ({"price": -1.0}, "--price -1.0: it must be a number of at least 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: it must be a whole number of at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError) as error:
        Options(**options)
    assert str(error.value) == text


def test_lists_of_the_command_line() -> None:
    assert numbers("--thresholds", "0.8, 0.9,0.8") == (0.8, 0.9)
    assert whole_numbers("--steps", "4,16") == (4, 16)
    assert row_limits("--rows", "1,max") == (1, "auto")
    with pytest.raises(JobError, match="--steps 4,x: give whole numbers such as 4,16"):
        whole_numbers("--steps", "4,x")
    with pytest.raises(JobError, match="--thresholds : give numbers"):
        numbers("--thresholds", "")
