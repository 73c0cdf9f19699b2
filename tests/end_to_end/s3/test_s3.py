"""Tests listing, exclusive create, a whole job and errors on a real S3 server."""

import threading
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import InputError, OutputError, StorageError
from pipeline.core.types import Totals
from pipeline.output.layout import check_writable
from pipeline.output.ledger import read_status
from pipeline.storage import retrying
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, open_ledger, plan_of, prompts, publish, reader_of, run, write
from tests.ports import held_ports

pytestmark = [pytest.mark.server]


def upload(folder: str, tmp_path: Path, name: str, rows: int, group: int | None = None) -> None:
    file = write(tmp_path / "staging" / name, prompt=prompts(rows), key=list(range(rows)), group=group)
    Storage(folder).write(name, file.read_bytes())


def test_a_plan_of_a_folder_a_file_and_a_glob(s3: str, tmp_path: Path) -> None:
    upload(f"{s3}/in", tmp_path, "a.parquet", 7, group=2)
    upload(f"{s3}/in", tmp_path, "sub/b c.parquet", 3)
    upload(f"{s3}/in", tmp_path, "_old/c.parquet", 3)
    upload(f"{s3}/in-other", tmp_path, "d.parquet", 3)  # its name begins with that of the folder
    plan = plan_of(make_job(f"{s3}/in/", f"{s3}/out", output={"rows_per_file": 4}))
    assert [(file.name, file.rows) for file in plan.files] == [("a.parquet", 7), ("sub/b c.parquet", 3)]
    assert [(unit.pieces[0].first_row, unit.row_count) for unit in plan.units] == [(0, 4), (4, 3), (0, 3)]
    assert all(file.stamp.startswith("etag:") for file in plan.files)
    assert plan.units[0].pieces[0].file == f"{s3}/in/a.parquet"
    (single,) = plan_of(make_job(f"{s3}/in/a.parquet", f"{s3}/out")).files
    assert single.name == "a.parquet"
    assert single.stamp == plan.files[0].stamp
    globbed = plan_of(make_job(f"{s3}/in*/*.parquet", f"{s3}/out")).files
    assert [file.name for file in globbed] == ["in-other/d.parquet", "in/a.parquet"]


def test_an_empty_object_counts_as_absent(s3: str) -> None:
    store = Storage(s3)
    store.write("x", b"")
    assert store.create("x", b"data")
    assert store.read("x") == b"data"
    assert not store.create("x", b"other")
    assert store.create("y", b"")
    assert not store.create("y", b"")


def test_of_several_writers_that_fill_an_empty_object_one_wins(s3: str) -> None:
    store = Storage(s3)
    store.write("x", b"")
    start, won = threading.Barrier(6), [False] * 6

    def write_it(number: int) -> None:
        start.wait()
        won[number] = Storage(s3).create("x", b"%04d" % number * 500)

    threads = [threading.Thread(target=write_it, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    assert store.read("x") == b"%04d" % won.index(True) * 500


def test_nothing_there(s3: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        plan_of(make_job(f"{s3}/absent", f"{s3}/out"))
    with pytest.raises(InputError, match="matches no file"):
        plan_of(make_job(f"{s3}/*.parquet", f"{s3}/out"))
    with pytest.raises(InputError, match="does not exist"):
        plan_of(make_job("s3://no-such-bucket/in", f"{s3}/out"))
    with pytest.raises(OutputError, match="does not exist"):
        read_status(f"{s3}/absent")


def test_wrong_credentials_are_one_line_without_secrets(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-secret")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(OutputError, match=r"cannot write to output .*: permission denied; check the rights") as caught:
        check_writable(f"{s3}/out")
    assert "not-the-right-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_does_not_answer_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes soon: a store that never answered is given less time than one that is away for a while."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retrying, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(retrying, "STRANGER_PATIENCE_S", 0.3)
    said = rf"cannot read {s3}/x: .*\(tried \d+ times in 0.3 s\)"
    with held_ports(1) as [silent_port]:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent_port}")
        S3FileSystem.clear_instance_cache()
        with pytest.raises(StorageError, match=said) as caught:
            Storage(s3).read("x")
    assert "\n" not in str(caught.value)


def test_a_race_has_one_winner(s3: str) -> None:
    store, writers = Storage(s3), 16
    start, won = threading.Barrier(writers), [False] * writers

    def create(number: int) -> None:
        start.wait()
        won[number] = store.create("x", b"%04d" % number * 2000)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    assert store.read("x") == b"%04d" % won.index(True) * 2000


def test_a_whole_job(s3: str, tmp_path: Path) -> None:
    upload(f"{s3}/in", tmp_path, "a.parquet", 40, group=15)
    job = make_job(f"{s3}/in", f"{s3}/out", output={"rows_per_file": 20}, input={"id_column": "key", "carry": ["key"]})
    plan, ledger, manifest = run(job)
    assert (manifest["rows"], manifest["ok"], manifest["duplicate_ids"]) == (40, 40, 0)
    assert len(ledger.finished(plan)) == len(plan.units) == 3
    assert read_status(f"{s3}/out").complete
    other = make_job(job.input.path, job.output.path, output={"rows_per_file": 20})
    with pytest.raises(OutputError, match=r'belongs to another job.*input\.id_column: "key" -> null'):
        open_ledger(other, plan_of(other))
    for part in Storage(f"{s3}/out").list_files("", "part-*.parquet"):
        (tmp_path / part.name).write_bytes(Storage(f"{s3}/out").read(part.name))
    with duckdb.connect() as db:
        rows = db.sql(f"SELECT source_row, key FROM '{tmp_path}/part-*.parquet' ORDER BY 1").fetchall()
    assert rows == [(i, i) for i in range(40)]


def test_resume_writes_missing_records_and_reports_others_parts(s3: str, tmp_path: Path) -> None:
    upload(f"{s3}/in", tmp_path, "a.parquet", 20)
    job = make_job(f"{s3}/in", f"{s3}/out", output={"rows_per_file": 10})
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    (first,) = publish(job, plan, plan.units[:1])
    Storage(f"{s3}/out").remove(f"_job/units/{plan.units[0].id}.json")
    found = open_ledger(job, plan).finished(plan)
    assert found[plan.units[0].id].sha256 == first.sha256
    assert Storage(f"{s3}/out").exists(f"_job/units/{plan.units[0].id}.json")
    late = publish(job, plan)
    assert [result.published_by_other for result in late] == [True, False]
    assert ledger.complete(plan, job, sum((r.totals for r in late), Totals()), seconds=1)["rows"] == 20


def test_an_object_replaced_since_planning_is_noticed(s3: str, tmp_path: Path) -> None:
    """An object of the same size with other content is noticed by its etag."""

    upload(f"{s3}/in", tmp_path, "a.parquet", 5)
    job = make_job(f"{s3}/in", f"{s3}/out")
    plan = plan_of(job)
    data = bytearray(Storage(f"{s3}/in").read("a.parquet"))
    data[10] ^= 1
    Storage(f"{s3}/in").write("a.parquet", bytes(data))
    with pytest.raises(InputError, match="has changed since the job was planned"):
        reader_of(job).read(plan.units[0])


def test_remote_files_are_read_by_ranges(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning fetches only the footer of a file, and reading a unit fetches its row group without the neighbours."""
    rows = [f"{i} " + "x" * 90 + str(i * 7919) for i in range(40_000)]
    file = write(tmp_path / "big.parquet", prompt=rows, group=5000)
    size = file.stat().st_size
    Storage(f"{s3}/in").write("big.parquet", file.read_bytes())
    fetched: list[int] = []
    read_range = Storage.read_range

    def counting(self: Storage, name: str, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return read_range(self, name, start, end)

    monkeypatch.setattr(Storage, "read_range", counting)

    job = make_job(f"{s3}/in", f"{s3}/out", output={"rows_per_file": 5000})
    plan = plan_of(job)
    assert sum(fetched) <= 70_000 < size / 4
    fetched.clear()
    reader = reader_of(job)
    assert len(reader.read(plan.units[3]).rows) == 5000
    assert sum(fetched) < size / 3
    column = pq.read_metadata(file).row_group(3).column(0)
    assert sum(fetched) >= column.total_compressed_size
