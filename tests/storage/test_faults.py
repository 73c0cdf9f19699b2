"""Faults at the wire: a busy store, connections that break, acknowledgements that never arrive."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage as storage_module
from pipeline.layout import part_name
from pipeline.storage import Storage
from tests.storage.fault_proxy import FaultProxy, fault_proxy
from tests.unit.pipeline_cases import make_job, open_ledger, plan_of, prompts, publish, write


@pytest.fixture
def proxy(
    s3: str,  # noqa: ARG001 (it sets the credentials)
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[FaultProxy]:
    """A proxy that the S3 client of this test goes through."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage_module, "LONGEST_WAIT_S", 0.05)
    with fault_proxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        S3FileSystem.clear_instance_cache()
        yield running
        S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_writing_survives(s3: str, proxy: FaultProxy, fault: str) -> None:
    proxy.fail("PUT", "/x", [fault] * 3)
    store = Storage(s3)
    assert store.create("x", b"data")
    assert proxy.faults == []
    assert store.read("x") == b"data"


@pytest.mark.parametrize("fault", ["503", "reset", "lost"])
def test_reading_survives(s3: str, proxy: FaultProxy, fault: str) -> None:
    store = Storage(s3)
    store.write("x", b"data")
    proxy.fail("GET", "/x", [fault] * 3)
    assert store.read_range("x", 1, 3) == b"at"
    assert proxy.faults == []


def test_a_lost_acknowledgement_is_settled(s3: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """The server took the part, its answer was lost: the retry is refused by the server, and yet the part is ours."""
    file = write(tmp_path / "a.parquet", prompt=prompts(5))
    job = make_job(file, f"{s3}/out")
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    name = part_name(plan.units[0].id)
    proxy.fail("PUT", f"/{name}", ["lost"])
    (result,) = publish(job, plan)
    assert proxy.faults == []
    assert not result.published_by_other
    assert ledger.finished(plan) == {plan.units[0].id: result}
    (late,) = publish(job, plan)
    assert late.published_by_other
    assert late.sha256 == result.sha256
