"""Tests of the output folder: one job takes it, publishes each part once, resumes from its parts, and completes it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import Job
from pipeline.core.errors import OutputError, StorageError
from pipeline.core.types import Totals
from pipeline.maintenance.verify import verify
from pipeline.output.layout import SEGMENTS, part_name
from pipeline.output.ledger import Ledger, read_status
from pipeline.output.records import TotalsRecord
from pipeline.planning.plan import Plan
from pipeline.storage.storage import Storage
from tests.pipeline.cases import (
    load,
    make_job,
    open_ledger,
    out,
    part_of,
    plan_of,
    prompts,
    publish,
    reader_of,
    run,
    store_of,
    two_files,
    write,
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return two_files(tmp_path)


def test_a_whole_job(job: Job) -> None:
    plan, ledger, manifest = run(job)
    assert sorted(path.name for path in out(job).iterdir()) == [
        "_SUCCESS",
        "_job",
        *sorted(part_name(unit.id) for unit in plan.units),
    ]
    assert (manifest["rows"], manifest["ok"], manifest["errors"], manifest["units"]) == (25, 23, 2, 3)
    assert manifest["finish_reasons"] == {"error": 2, "length": 11, "stop": 12}
    assert (manifest["duplicate_ids"], manifest["duplicate_id_examples"], manifest["null_ids"]) == (2, ["3"], 1)
    assert manifest["fingerprint"] == plan.fingerprint.digest
    assert load(out(job, "_job/manifest.json")) == manifest
    assert ledger.is_complete()
    record = load(out(job, f"_job/units/{plan.units[0].id}.json"))
    assert record["part_bytes"] == out(job, part_name(plan.units[0].id)).stat().st_size
    assert {"rows", "ok", "errors", "completion_tokens", "seconds", "sha256", "fingerprint", "writer"} <= set(record)


def test_rows_out_are_rows_in_and_duckdb_reads_them(job: Job) -> None:
    import duckdb

    run(job)
    parts = f"{job.output.path}/part-*.parquet"
    with duckdb.connect() as db:
        query = f"SELECT finish_reason, count(*), sum(completion_tokens)/sum(latency_s) FROM '{parts}' GROUP BY 1"
        rates = {reason: (rows, rate) for reason, rows, rate in db.sql(query).fetchall()}
        assert rates["stop"] == (12, 6.0)
        assert rates["length"] == (11, 6.0)
        assert rates["error"][0] == 2
        places = db.sql(f"SELECT source_file, source_row FROM '{parts}' ORDER BY ALL").fetchall()
        assert places == [("a.parquet", i) for i in range(20)] + [("b.parquet", i) for i in range(5)]
        assert db.sql(f"SELECT id FROM '{parts}' WHERE error = 'prompt is null'").fetchall() == [(30,)]


def test_readers_of_the_folder_see_parts_alone(job: Job) -> None:
    import pyarrow.dataset as ds

    plan, _, _ = run(job)
    assert ds.dataset(job.output.path, format="parquet").count_rows() == plan.rows


# Resume


def test_finished_units_are_known_from_their_parts(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    assert ledger.finished(plan) == {}
    published = publish(job, plan, plan.units[:2])
    again = open_ledger(job, plan)  # the same job is submitted again
    found = again.finished(plan)
    assert [(unit, result.totals) for unit, result in found.items()] == [(r.unit_id, r.totals) for r in published]
    assert not again.is_complete()


def test_a_part_costs_a_resume_one_request(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume lists all parts once and all records once, and reads the footer of each part."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    publish(job, plan)
    opened: list[str] = []

    def refuse(_self: Storage, name: str, *_: object) -> bytes:
        raise AssertionError(f"{name} was read")

    open_file = Storage.open

    def noted(self: Storage, name: str, size: int) -> pa.NativeFile:
        opened.append(name)
        return open_file(self, name, size)

    monkeypatch.setattr(Storage, "open", noted)
    for method in ("read", "read_range", "read_if_exists", "sha256"):
        monkeypatch.setattr(Storage, method, refuse)
    assert len(ledger.finished(plan)) == 3
    assert sorted(opened) == sorted(part_name(unit.id) for unit in plan.units)


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_part_without_its_record_is_read_back_and_the_record_written(job: Job, damage: str) -> None:
    """A crash between the part and its record loses nothing, because the footer of the part has the same data."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    results = {result.unit_id: result for result in publish(job, plan)}
    record = out(job, f"_job/units/{plan.units[1].id}.json")
    before = load(record)
    if damage == "missing":
        record.unlink()
    else:
        record.write_bytes(b"")
    ledger.finished(plan, repair=False)
    assert not record.exists() or record.read_bytes() == b""
    found = ledger.finished(plan)
    assert {unit: result.totals for unit, result in found.items()} == {u: r.totals for u, r in results.items()}
    assert found[plan.units[1].id].sha256 == results[plan.units[1].id].sha256
    assert {**load(record), "seconds": 0} == {**before, "seconds": 0}


@pytest.mark.parametrize(
    "damage",
    [
        *(b"{", b"[" * 200_000, b"{}", {"rows": 9999}, {"errors": -5, "ok": 15}, {"unit": "z"}, {"another": 1}),
        *({"attempt": "1"}, {"attempt": True}, {"attempt": 1.0}, {"seconds": "1"}, {"null_ids": 2**63}),
    ],
)
def test_a_record_that_is_wrong_counts_for_nothing(job: Job, damage: bytes | dict[str, Any]) -> None:
    """The part itself says what it holds. `verify` names the record, and after it is deleted, it is written again."""
    plan, ledger, manifest = run(job)
    record = out(job, f"_job/units/{plan.units[1].id}.json")
    before = load(record)
    record.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**before, **damage}).encode())
    assert read_status(job.output.path).totals.rows == 25
    assert sum(result.totals.rows for result in ledger.finished(plan).values()) == manifest["rows"]
    [problem] = verify(job.output.path).problems
    assert problem.startswith(f"_job/units/{record.name} ")
    assert problem.endswith("; move it away and submit the job again")
    record.unlink()
    ledger.finished(plan)
    assert verify(job.output.path).problems == ()
    assert {**load(record), "seconds": 0} == {**before, "seconds": 0}


def test_all_totals_are_in_their_record() -> None:
    assert TotalsRecord.model_fields.keys() == Totals.__dataclass_fields__.keys()


def test_damage_of_the_same_size_to_a_footer_is_found(job: Job) -> None:
    """It is found although the record says that all is well."""
    plan, ledger, _ = run(job)
    part = out(job, part_name(plan.units[1].id))
    whole = part.read_bytes()
    part.write_bytes(whole[:-300] + bytes(292) + whole[-8:])
    with pytest.raises(OutputError, match=rf"{part.name} is broken.*move it away"):
        ledger.finished(plan)
    assert not read_status(job.output.path).complete


def test_damaged_ids_are_named(job: Job) -> None:
    """The damage is inside the data, so it is found when the data is read."""
    plan, ledger, manifest = run(job)
    part = out(job, part_name(plan.units[1].id))
    whole = part.read_bytes()
    part.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    totals = Totals(rows=manifest["rows"])
    with pytest.raises(OutputError, match=rf"{part.name} is broken.*move it away"):
        ledger.complete(plan, job, totals, seconds=1.0)


def test_a_record_without_its_part_counts_for_nothing(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    publish(job, plan)
    out(job, part_name(plan.units[0].id)).unlink()
    assert plan.units[0].id not in ledger.finished(plan)


def test_the_record_of_a_deleted_part_does_not_outlive_it(job: Job) -> None:
    """If it did, and the run died between the new part and its record, the part would seem to be damaged for good."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    publish(job, plan)
    first, *others = (out(job, f"_job/units/{unit.id}.json") for unit in plan.units)
    out(job, part_name(plan.units[0].id)).unlink()
    ledger.finished(plan, repair=False)
    assert first.exists()
    ledger.finished(plan)
    assert not first.exists()
    assert all(record.exists() for record in others)


def test_the_record_of_another_attempts_part_is_blamed_and_not_the_part(job: Job) -> None:
    plan, _, _ = run(job)
    unit = plan.units[1]
    part, record = out(job, part_name(unit.id)), out(job, f"_job/units/{unit.id}.json")
    before = record.read_bytes()
    part.unlink()
    publish(job, plan, (unit,))
    record.write_bytes(before)
    assert verify(job.output.path).problems == (
        f"_job/units/{record.name} is the record of another attempt's part; move it away and submit the job again",
    )


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_broken_part_is_named(job: Job, damage: str, with_record: bool) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    publish(job, plan)
    part = out(job, part_name(plan.units[1].id))
    if damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), part)
    else:
        part.write_bytes(part.read_bytes()[:-20])
    if not with_record:
        out(job, f"_job/units/{plan.units[1].id}.json").unlink()
    with pytest.raises(OutputError, match=rf"{part.name} is (truncated|broken).*move it away"):
        ledger.finished(plan)


def test_a_part_of_another_job_is_named(job: Job, tmp_path: Path) -> None:
    plan, ledger, _ = run(job)
    elsewhere = job.model_copy(update={"output": job.output.model_copy(update={"path": str(tmp_path / "other")})})
    other = make_job(job.input.path, elsewhere.output.path, output={"rows_per_file": 10}, generation={"seed": 1})
    run(other)
    part = part_name(plan.units[0].id)
    record = f"_job/units/{plan.units[0].id}.json"
    out(job, part).write_bytes(out(other, part).read_bytes())
    out(job, record).unlink()
    with pytest.raises(OutputError, match=f"{part} is another job's part"):
        ledger.finished(plan)
    out(job, record).write_bytes(out(other, record).read_bytes())
    with pytest.raises(OutputError, match=f"{part} is another job's part"):
        ledger.finished(plan)
    out(job, part).rename(out(job, "part-000000000000-0000000000.parquet"))
    with pytest.raises(OutputError, match=r"part-000000000000-0000000000\.parquet is another job's part: move it away"):
        ledger.finished(plan)


# Ownership of the folder


def test_another_job_is_refused_and_the_difference_named(job: Job) -> None:
    run(job)
    before = {path: path.read_bytes() for path in out(job).rglob("*") if path.is_file()}
    write(Path(job.input.path) / "c.parquet", prompt=["new"], key=[1])
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4, "stop": ("END",)})})
    with pytest.raises(OutputError) as caught:
        open_ledger(other, plan_of(other))
    message = str(caught.value)
    assert "input files: c.parquet is new" in message
    assert "generation.seed: 0 -> 4" in message
    assert 'generation.stop: [] -> ["END"]' in message
    assert "use another output.path" in message.lower()
    assert "delete" not in message
    assert {path: path.read_bytes() for path in out(job).rglob("*") if path.is_file()} == before


def test_files_gone_and_changed_are_named(job: Job) -> None:
    run(job)
    write(Path(job.input.path) / "a.parquet", prompt=prompts(21), key=list(range(21)))
    (Path(job.input.path) / "b.parquet").unlink()
    with pytest.raises(OutputError, match=r"input files: a\.parquet has changed, b\.parquet is gone"):
        open_ledger(job, plan_of(job))


def segment(job: Job, plan: Plan) -> Path:
    """Write a file to the folder where replicas save finished rows of the first unit, and return its path."""
    path = out(job, f"{SEGMENTS}/{plan.units[0].id}/0123-1.parquet")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"rows")
    return path


def test_segments_protect_a_folder_as_parts_do(job: Job) -> None:
    """A job that was killed before its first part also has rows to lose."""
    plan = plan_of(job)
    open_ledger(job, plan)
    segment(job, plan)
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4})})
    with pytest.raises(OutputError, match=r"belongs to another job.*generation\.seed: 0 -> 4"):
        open_ledger(other, plan_of(other))
    open_ledger(job, plan)
    out(job, "_job/plan.json").unlink()
    with pytest.raises(OutputError, match=r"plan\.json is missing, but there is 1 file with finished rows"):
        read_status(job.output.path)


def test_a_complete_job_has_no_segments(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    left = segment(job, plan)
    ledger.complete(plan, job, sum((result.totals for result in publish(job, plan)), Totals()), seconds=1.0)
    assert not left.exists()


def test_the_plan_of_a_job_without_parts_is_replaced(job: Job) -> None:
    """A run that never got a replica must not keep the corrected job out."""
    open_ledger(job, plan_of(job))
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4})})
    plan = plan_of(other)
    ledger = open_ledger(other, plan)
    assert load(out(job, "_job/plan.json"))["fingerprint"]["digest"] == plan.fingerprint.digest
    totals = sum((result.totals for result in publish(other, plan)), Totals())
    ledger.complete(plan, other, totals, seconds=1.0)
    with pytest.raises(OutputError, match=r"generation\.seed: 4 -> 0"):
        open_ledger(job, plan_of(job))


def test_a_job_whose_folder_was_taken_does_not_complete_it(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4})})
    open_ledger(other, plan_of(other))
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    with pytest.raises(OutputError, match=r"belongs to another job.*generation\.seed: 4 -> 0"):
        ledger.complete(plan, job, totals, seconds=1.0)
    assert not ledger.is_complete()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("fingerprint", []),
        ("fingerprint.fields", []),
        ("fingerprint.digest", "0" * 64),
        ("files", {}),
        ("files", [1]),
        ("files", [{"name": "a.parquet", "stamp": "", "rows": 1}]),
        ("rows", "x"),
        ("units", -1),
        ("units", "3"),
        ("units", True),
        ("units", 3.0),
        ("created", None),
        ("job", []),
        ("job.checkpoint", {}),  # the old name of job.flush, which is there too
    ],
)
def test_a_damaged_plan_file_is_named_and_made_again(job: Job, path: str, value: object) -> None:
    run(job)
    whole, data = (load(out(job, "_job/plan.json")) for _ in range(2))
    section, _, name = path.rpartition(".")
    (data[section] if section else data)[name] = value
    for text in (json.dumps(data), "[" * 200_000):
        out(job, "_job/plan.json").write_text(text)
        with pytest.raises(
            OutputError,
            match=r"plan\.json cannot be read: .*submit the same job again, which makes the plan",
        ):
            read_status(job.output.path)
        open_ledger(job, plan_of(job))  # makes it again; only the time when the job first ran is that of its first part
        lost = {"created": "", "checksum": ""}
        assert {**load(out(job, "_job/plan.json")), **lost} == {**whole, **lost}


def test_folders_that_cannot_be_an_output(job: Job, tmp_path: Path) -> None:
    plan = plan_of(job)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file: give a folder"):
        Ledger(str(tmp_path / "file"), plan.fingerprint.digest).open(plan, job)
    with pytest.raises(OutputError, match="cannot write to output"):
        Ledger(str(tmp_path / "file/out"), plan.fingerprint.digest).open(plan, job)


def test_a_damaged_plan_of_a_job_without_rows_is_replaced(job: Job) -> None:
    plan = plan_of(job)
    out(job, "_job").mkdir(parents=True)
    for damaged in ("", "{"):
        out(job, "_job/plan.json").write_text(damaged)
        with pytest.raises(OutputError, match=r"plan\.json (is empty|cannot be read: .*): submit the job again"):
            read_status(job.output.path)
        open_ledger(job, plan)
        assert load(out(job, "_job/plan.json"))["fingerprint"]["digest"] == plan.fingerprint.digest


def test_opening_a_complete_output_again_changes_nothing(job: Job) -> None:
    run(job)
    before = {path: path.stat().st_mtime_ns for path in out(job).rglob("*")}
    assert open_ledger(job, plan_of(job)).is_complete()
    assert {path: path.stat().st_mtime_ns for path in out(job).rglob("*")} == before


def test_records_hold_no_credentials(job: Job) -> None:
    """plan.json and the manifest show the job's settings, including URLs."""
    private = job.model_copy(
        update={"model": job.model.model_copy(update={"checkpoint": "s3://k:hidden@b/c?t=hidden"})}
    )
    run(private)
    for name in ("_job/plan.json", "_job/manifest.json"):
        assert "s3://b/c" in out(job, name).read_text()
        assert "hidden" not in out(job, name).read_text()


# Publishing


def test_the_first_writer_wins(job: Job) -> None:
    """If a unit is computed twice (because a replica was thought dead), it is published once, and the later replica
    reports that part."""
    plan = plan_of(job)
    open_ledger(job, plan)
    data = reader_of(job).read(plan.units[0])
    first = store_of(job, plan).publish(plan.units[0], part_of(data, plan, attempt=1))
    part = out(job, part_name(plan.units[0].id)).read_bytes()
    second = store_of(job, plan).publish(plan.units[0], part_of(data, plan, attempt=2))
    assert (first.published_by_other, second.published_by_other) == (False, True)
    assert (second.attempt, second.totals, second.sha256) == (1, first.totals, first.sha256)
    assert out(job, part_name(plan.units[0].id)).read_bytes() == part
    assert load(out(job, f"_job/units/{plan.units[0].id}.json"))["attempt"] == 1


def test_a_lost_acknowledgement_is_success(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part arrives but the answer is lost, and the retry finds the part there. The writer id inside shows that it
    is our own."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    create = Storage.create

    def losing(self: Storage, name: str, data: bytes) -> bool:
        create(self, name, data)
        return create(self, name, data)

    monkeypatch.setattr(Storage, "create", losing)
    (result,) = publish(job, plan, plan.units[:1])
    assert not result.published_by_other
    assert list(ledger.finished(plan)) == [plan.units[0].id]


def test_a_record_that_cannot_be_written_is_not_the_units_failure(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the part is there. The job completes, and the next resume writes the record."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)

    def full(_self: Storage, name: str, _data: bytes) -> None:
        raise StorageError(f"cannot write {name}: no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        results = publish(job, plan)
        assert len(ledger.finished(plan)) == 3
    assert not out(job, "_job/units").exists()
    ledger.complete(plan, job, sum((result.totals for result in results), Totals()), seconds=1.0)
    assert len(ledger.finished(plan)) == 3
    assert len(list(out(job, "_job/units").iterdir())) == 3


def test_nothing_is_published_under_a_wrong_name(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    data = reader_of(job).read(plan.units[0])
    with pytest.raises(OutputError, match=f"holds unit {plan.units[0].id}, not {plan.units[1].id}"):
        store_of(job, plan).publish(plan.units[1], part_of(data, plan))
    assert ledger.finished(plan) == {}


# Completion


def test_a_job_with_a_part_missing_is_not_complete(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    out(job, part_name(plan.units[2].id)).unlink()
    with pytest.raises(OutputError, match="missing parts: 1 of 3"):
        ledger.complete(plan, job, totals, seconds=1.0)
    with pytest.raises(OutputError, match="finished rows: 0 of 25"):
        ledger.complete(plan, job, Totals(), seconds=1.0)
    assert not ledger.is_complete()
    assert not out(job, "_job/manifest.json").exists()


def test_what_killed_writers_left_is_gone_when_the_job_is_complete(job: Job) -> None:
    """After a kill -9 and a resume, `verify` therefore finds no problem."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    unit = plan.units[0].id
    for name in (f".part-{unit}.parquet", f"_job/units/.{unit}.json", f"_job/segments/{unit}/.x.parquet"):
        out(job, name).parent.mkdir(parents=True, exist_ok=True)
        out(job, f"{name}.{'a' * 32}.tmp").write_bytes(b"half")
    ledger.complete(plan, job, totals, seconds=1.0)
    assert verify(job.output.path).problems == ()
