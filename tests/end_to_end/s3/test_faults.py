"""Tests faults of the connection: a busy store, broken or hanging connections, answers that are cut or get lost."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import StorageError
from pipeline.output.layout import part_name
from pipeline.storage import retrying
from pipeline.storage import storage as storage_module
from pipeline.storage.storage import Storage
from tests.end_to_end.s3.fault_proxy import RANDOM_FAULTS, FaultProxy
from tests.pipeline.cases import make_job, open_ledger, plan_of, prompts, publish, reader_of, write
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.server]

LOSSES = ["503", "500", "reset", "lost", "cut", "short", "slow"]


@pytest.mark.parametrize("fault", ["503", "500", "reset"])
def test_writing_survives(s3: str, proxy: FaultProxy, fault: str) -> None:
    store = Storage(s3)
    proxy.fail("PUT", "/x", [fault] * 8)
    assert store.create("x", b"data")
    assert proxy.injected == {fault: 8}
    proxy.fail("PUT", "/x", [fault] * 2)
    store.write("x", b"other")
    assert proxy.injected == {fault: 10}
    assert store.read("x") == b"other"


@pytest.mark.parametrize("fault", LOSSES)
def test_reading_survives(s3: str, proxy: FaultProxy, fault: str) -> None:
    """Whole reads and ranges give the right bytes after retries, even if the length of an answer is wrong."""
    store, data = Storage(s3), random.Random(fault).randbytes(100_000)
    store.write("x", data)
    proxy.fail("GET", "/x", [fault] * 8)
    assert store.read_range("x", 1000, 90_000) == data[1000:90_000]
    proxy.fail("GET", "/x", [fault] * 2)
    assert store.read("x") == data
    proxy.fail("GET", "/x", [fault] * 2)
    assert store.read_if_exists("x") == data
    assert sum(proxy.injected.values()) == (3 if fault == "slow" else 12)
    with store.open("x", len(data)) as file:
        proxy.fail("GET", "/x", [fault] * 2)
        assert file.read() == data


@pytest.mark.parametrize("fault", LOSSES)
def test_reading_with_the_facts_survives(s3: str, proxy: FaultProxy, fault: str) -> None:
    """The bytes and the facts come in one request, and the facts are those of the listing."""
    store, data = Storage(s3), random.Random(fault).randbytes(10_000)
    store.write("x", data)
    proxy.requests.clear()
    assert store.read_version("x", len(data)) == (data, store.find()[0])
    assert proxy.requests == {"GET": 2}
    proxy.fail("GET", "/x", [fault] * 2)
    assert store.read_version("x", len(data))[0] == data
    assert sum(proxy.injected.values()) == (1 if fault == "slow" else 2)


def test_reading_with_the_facts_notices_another_version(s3: str, proxy: FaultProxy) -> None:
    """A longer object is read in part, and its facts say so; a shorter one, and a missing one, is an error."""
    store = Storage(s3)
    store.write("x", b"0123456789")
    data, info = store.read_version("x", 4)
    assert (data, info) == (b"0123", store.stat("x"))
    with pytest.raises(StorageError, match="it has 10 bytes, and bytes up to 11 were asked for: it was replaced"):
        store.read_version("x", 11)
    with pytest.raises(StorageError, match="y: it does not exist"):
        store.read_version("y", 4)
    assert proxy.injected == {}


@pytest.mark.parametrize("fault", LOSSES)
def test_looking_and_listing_survive(s3: str, proxy: FaultProxy, fault: str) -> None:
    """No fault makes an existing file look missing or a listing incomplete."""
    store = Storage(s3)
    for number in range(5):
        store.write(f"a/{number}", b"x")
    proxy.fail("HEAD", "/a/3", [fault] * 2)
    assert store.exists("a/3")
    proxy.fail("HEAD", "/a/3", [fault] * 2)
    assert store.stat("a/3")
    proxy.fail("GET", "/test", [fault] * 2)
    assert [info.name for info in store.list_files("a", "*")] == [f"a/{number}" for number in range(5)]
    proxy.fail("GET", "/test", [fault] * 2)
    assert len(store.find()) == 5


def test_removing_survives_a_lost_acknowledgement(s3: str, proxy: FaultProxy) -> None:
    store = Storage(s3)
    store.write("x", b"data")
    proxy.fail("DELETE", "/x", ["lost", "500", "reset", "lost"])
    store.remove("x")
    assert proxy.faults == []
    assert not store.exists("x")


def test_a_lost_acknowledgement_is_settled(s3: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """If the server stored the part but its answer was lost, it refuses the retry, and yet the part counts as ours."""
    file = write(tmp_path / "a.parquet", prompt=prompts(5))
    job = make_job(file, f"{s3}/out")
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    name = part_name(plan.units[0].id)
    proxy.fail("PUT", f"/{name}", ["lost"])
    (result,) = publish(job, plan)
    assert proxy.faults == []
    assert not result.published_by_other
    assert {unit: found.totals for unit, found in ledger.finished(plan).items()} == {result.unit_id: result.totals}
    (late,) = publish(job, plan)
    assert late.published_by_other
    assert late.sha256 == result.sha256


def test_hanging_and_dripping_answers_are_cut_off(s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try is limited by size and time, not only by silence, so a byte now and then keeps no replica waiting."""
    store, limit = Storage(s3), Storage._limit
    store.write("x", b"data" * 100)
    store.write("y", b"data")

    def short_where_it_fails(self: Storage, size: int) -> dict[str, float]:
        """Give a try that meets a fault one second, and all others as long as a busy machine may take."""
        with monkeypatch.context() as patch:
            patch.setattr(storage_module, "ANSWER_S", 1.0 if proxy.faults else 60.0)
            return limit(self, size)

    monkeypatch.setattr(Storage, "_limit", short_where_it_fails)
    proxy.fail("GET", "/x", ["hang"])
    assert store.read("x") == b"data" * 100
    proxy.drip_s = 30.0
    proxy.fail("GET", "/x", ["slow"])
    assert store.read("x") == b"data" * 100
    proxy.fail("PUT", "/z", ["hang"])
    assert store.create("z", b"data")
    assert proxy.injected == {"hang": 2, "slow": 1}
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.5)
    proxy.fail("GET", "/y", ["hang"] * 9)
    with pytest.raises(StorageError, match=rf"^cannot read {s3}/y: no whole answer in time \(tried 1 ti"):
        store.read("y")


def test_a_store_that_stays_down_is_one_line(s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.3)
    for fault, said in (("503", "reduce your request rate"), ("500", "internal error"), ("reset", "onnection")):
        proxy.fail_at_random(0, 1.0, [fault])
        with pytest.raises(StorageError, match=rf"^cannot create {s3}/x: .*{said}.* \(tried \d+ times in 0.3 s\)$"):
            Storage(s3).create("x", b"data")


@pytest.mark.parametrize("fault", ["lost", "500"])
def test_a_large_file_leaves_no_pending_upload(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A large file is uploaded in one request, refused or not. An upload in several requests can leave parts behind,
    which nobody sees but which cost money."""
    # the server may be slow with so large a file: a retry after a timeout would find the file of the first try
    patient = {**storage_module._S3_OPTIONS["config_kwargs"], "read_timeout": PATIENCE_S}  # type: ignore[dict-item]
    monkeypatch.setitem(storage_module._S3_OPTIONS, "config_kwargs", patient)
    store, data = Storage(s3), bytes(110 << 20)  # s3fs by itself would upload it in pieces
    proxy.fail("PUT", "/big", [fault])
    assert store.create("big", data) == (fault != "lost")
    assert not store.create("big", b"other" + data)
    assert proxy.requests["POST"] == 0
    assert store.read_range("big", 0, 5) == bytes(5)


def test_a_file_too_large_for_one_request_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "S3_FILE_BYTES", 1000)
    with pytest.raises(StorageError, match=rf"^cannot create {s3}/big: 1001 bytes are too many for one S3 request"):
        Storage(s3).create("big", bytes(1001))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("files", [1, 4])
def test_flipped_bits_of_the_input_change_no_row(s3: str, proxy: FaultProxy, seed: int, files: int) -> None:
    """A third of all answers have a flipped bit while rows are read, from one file as it is decoded or from several
    that are fetched whole. The pages have checksums."""
    texts = [f"{text} {'word ' * 100}" for text in prompts(400 * files)]
    for number in range(files):
        sink = pa.BufferOutputStream()
        table = pa.table({"prompt": texts[400 * number : 400 * (number + 1)]})
        # nothing but the checksums notices the flip: there is neither a dictionary nor compression
        pq.write_table(
            table, sink, row_group_size=50, use_dictionary=False, compression="none", write_page_checksum=True
        )
        Storage(f"{s3}/in").write(f"{number}.parquet", sink.getvalue().to_pybytes())
    job = make_job(f"{s3}/in", f"{s3}/out", output={"rows_per_file": 2000})
    plan = plan_of(job)
    reader = reader_of(job)
    proxy.fail_at_random(seed, 0.34, ["flip"])
    rows = [row for unit in plan.units for row in reader.read(unit).rows]
    reader.close()
    assert proxy.injected["flip"] > 0
    assert [row.prompt for row in rows] == texts


@pytest.mark.parametrize("seed", range(2))
def test_a_whole_job_among_random_faults(s3: str, proxy: FaultProxy, tmp_path: Path, seed: int) -> None:
    """A job publishes every part once with the right content, although a third of all requests fail."""
    file = write(tmp_path / "a.parquet", prompt=prompts(60), group=10)
    Storage(f"{s3}/in").write("a.parquet", file.read_bytes())
    job = make_job(f"{s3}/in", f"{s3}/out", output={"rows_per_file": 10})
    proxy.fail_at_random(seed, 0.33, RANDOM_FAULTS)
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    results = publish(job, plan)
    assert ledger.finished(plan).keys() == {unit.id for unit in plan.units}
    out = Storage(f"{s3}/out")
    stored = {part.name: out.sha256(part.name, part.size) for part in out.list_files("", "part-*.parquet")}
    assert stored == {part_name(result.unit_id): result.sha256 for result in results}
    assert sum(result.totals.rows for result in results) == 60
    assert not any(result.published_by_other for result in results)
    assert len(proxy.injected) > 4
