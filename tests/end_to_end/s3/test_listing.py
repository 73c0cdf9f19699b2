"""Tests of listings that are too short: rows must not be left out unnoticed, and no job is refused for it."""

from pathlib import Path

import pytest

from pipeline.input.files import list_input
from pipeline.storage.storage import Storage
from tests.end_to_end.s3.fault_proxy import FaultProxy
from tests.pipeline.cases import make_job, plan_of, prompts, write

pytestmark = [pytest.mark.server]

FILES = 6


def fill(folder: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.parquet", prompt=prompts(100)).read_bytes()
    for number in range(FILES):
        Storage(folder).write(f"{number}.parquet", data)


@pytest.mark.parametrize("fault", ["fewer", "unseen", "endless"])
@pytest.mark.parametrize("way", ["folder", "glob"])
def test_a_short_listing_of_the_input_hides_no_rows(
    s3: str, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, way: str
) -> None:
    """The store leaves out half of the files once, with or without counting them. The plan has the rows of all."""
    fill(s3, tmp_path)
    # s3fs looks at the folder before it makes the listing that counts: with one GET, for a glob with two
    proxy.fail("GET", "/test", [*["slow"] * (2 if way == "glob" else 1), fault])
    plan = plan_of(make_job(s3 if way == "folder" else f"{s3}/*.parquet", tmp_path / "out"))
    assert proxy.injected[fault] == 1
    assert plan.rows == 100 * FILES
    assert len(caplog.messages) == (1 if fault == "unseen" else 0)
    if fault == "unseen":
        assert "its listings differ (3, 6, 6 files): the last two agree and are used" in caplog.text


@pytest.mark.parametrize("fault", ["fewer", "endless"])
def test_any_listing_that_contradicts_itself_is_made_again(s3: str, proxy: FaultProxy, fault: str) -> None:
    store = Storage(s3)
    for number in range(FILES):
        store.write(f"a/{number}", b"x")
    for lister in (store.find, lambda: store.list_files("a", "*"), lambda: store.glob("a/*")):
        proxy.fail("GET", "/test", [fault] * 2)
        assert len(lister()) == FILES
        assert proxy.faults == []


def test_a_store_that_counts_in_another_way_is_not_refused(
    s3: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Every answer contradicts itself. What came is used, and one warning says so."""
    store = Storage(s3)
    for number in range(FILES):
        store.write(f"{number}", b"x")
    proxy.fail("GET", "/test", ["fewer"] * 100)
    assert len(store.find()) == FILES // 2
    assert len(store.find()) == FILES // 2
    (warning,) = caplog.messages
    assert warning.endswith("has fewer entries than the store says, each time; all 3 that came are used")
    assert len(proxy.faults) == 100 - 5


def test_an_input_folder_that_a_listing_does_not_show_is_looked_for_again(
    s3: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    fill(s3, tmp_path)
    assert Storage(s3).kind() == "folder"
    proxy.fail("GET", "/test", ["empty"])
    root, files = list_input(s3)
    assert (root, len(files), proxy.injected["empty"]) == (s3, FILES, 1)
