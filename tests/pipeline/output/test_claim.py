"""Tests of job ownership: the driver that started last has the job, and the other drivers hear of it."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import JobFailed, StorageError
from pipeline.output.claim import Claim, DriverRecord, newest_driver, read_driver
from pipeline.storage.storage import FileInfo, Storage
from tests.waiting import PATIENCE_S, wait_until


def files(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "_job/drivers").iterdir())


def test_the_newest_claim_holds_and_older_ones_are_removed(tmp_path: Path) -> None:
    first = Claim(str(tmp_path))
    first.check_now()
    second = Claim(str(tmp_path))
    assert files(tmp_path) == ["00000002.json"]
    second.check_now()
    with pytest.raises(
        JobFailed, match=r"another driver of this job took over output .* \(pid \d+ on .*, since 20.*ends"
    ):
        first.check_now()
    with pytest.raises(JobFailed):
        first.check()
    assert Claim(str(tmp_path)).number == 3


def test_of_many_at_once_one_holds_and_all_others_are_told(tmp_path: Path) -> None:
    with ThreadPoolExecutor(12) as threads:
        claims = list(threads.map(lambda _: Claim(str(tmp_path)), range(12)))
    hold = []
    for claim in claims:
        with suppress(JobFailed):
            claim.check_now()
            hold.append(claim.number)
    assert hold == [max(claim.number for claim in claims)]
    assert f"{hold[0]:08}.json" in files(tmp_path)


def test_the_watch_hears_of_a_newer_driver(tmp_path: Path) -> None:
    with Claim(str(tmp_path), check_s=0.01) as claim:
        claim.check()
        Claim(str(tmp_path))
        wait_until(lambda: claim._end is not None)
        with pytest.raises(JobFailed):
            claim.check()


class Broken(Storage):
    """A storage whose listing fails a few times, and then hangs until it is released."""

    failures = 3

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.hangs = threading.Event()
        self.let_go = threading.Event()
        self.calls = 0

    def list_files(self, folder: str, pattern: str) -> list[FileInfo]:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise StorageError("cannot list")
        self.hangs.set()
        self.let_go.wait(PATIENCE_S)
        return super().list_files(folder, pattern)


def test_storage_that_fails_or_hangs_stops_neither_the_watch_nor_the_driver(tmp_path: Path) -> None:
    claim = Claim(str(tmp_path), check_s=0.01)
    claim._storage = storage = Broken(str(tmp_path))
    with claim:
        assert storage.hangs.wait(PATIENCE_S)
        calls = storage.calls
        claim.check()
        assert storage.calls == calls  # check() asks no storage, so it does not hang with the watch
        Claim(str(tmp_path))
        storage.let_go.set()
        wait_until(lambda: claim._end is not None)


class LosesAcknowledgement(Storage):
    def create(self, name: str, data: bytes) -> bool:
        super().create(name, data)
        return super().create(name, data)


def test_a_lost_acknowledgement_is_no_other_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.claim.Storage", LosesAcknowledgement)
    claim = Claim(str(tmp_path))
    assert (claim.number, files(tmp_path)) == (1, ["00000001.json"])
    claim.check_now()


def test_foreign_files_beside_claims_and_a_broken_claim_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "_job/drivers"
    folder.mkdir(parents=True)
    for name in ("notes.json", "7.json", "999999999.json", "-0000001.json"):
        (folder / name).write_text("{}")
    claim = Claim(str(tmp_path))
    assert claim.number == 1
    claim.check_now()
    (folder / "00000004.json").write_bytes(b"\xff\x00")
    with pytest.raises(JobFailed, match="its record cannot be read"):
        claim.check_now()


def test_a_claim_that_is_missed_twice_ends_the_driver(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        claim = Claim(str(tmp_path))
        assert claim.number == number
    path = tmp_path / "_job/drivers/00000003.json"
    content = path.read_bytes()
    path.unlink()
    claim._look()
    claim.check()  # one look may have come at a bad moment
    path.write_bytes(content)
    claim._look()
    path.unlink()
    claim._look()
    claim.check()
    claim._look()
    with pytest.raises(JobFailed, match=r"removed or moved: output .* has no _job/drivers/00000003\.json any more"):
        claim.check()


def test_a_look_that_was_asked_for_is_repeated_at_once_if_it_misses_the_claim(tmp_path: Path) -> None:
    claim = Claim(str(tmp_path / "out"), check_s=0.001)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    with pytest.raises(JobFailed, match=r"output .*/out does not exist any more.*put it back"):
        claim.check_now()
    assert not (tmp_path / "out").exists()


def test_a_new_folder_with_another_drivers_claim_is_taken_over(tmp_path: Path) -> None:
    """The folder was moved, and another driver has begun a new one. Its claim has the same number."""
    claim = Claim(str(tmp_path / "out"))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert Claim(str(tmp_path / "out")).number == claim.number
    with pytest.raises(JobFailed, match="another driver of this job took over"):
        claim.check_now()


def test_an_empty_claim_is_none_and_keeps_its_number(tmp_path: Path) -> None:
    """A killed driver left it, on a file system without hard links. Who takes its name as well may not be told."""
    folder = tmp_path / "_job/drivers"
    folder.mkdir(parents=True)
    (folder / "00000004.json").touch()
    assert newest_driver(Storage(str(tmp_path))) is None
    claim = Claim(str(tmp_path))
    assert claim.number == 5
    (folder / "00000006.json").touch()
    claim.check_now()


def test_of_two_drivers_that_fill_the_same_empty_name_one_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are told that they have created it; the content that stays says whose it is."""
    create = Storage.create

    def filled_by_both(self: Storage, name: str, data: bytes) -> bool:
        create(self, name, data)
        monkeypatch.setattr(Storage, "create", create)
        other = DriverRecord(token="other", host="elsewhere", pid=1, started="2026-01-01T00:00:00+00:00")
        self.write(name, other.model_dump_json().encode())
        return True

    monkeypatch.setattr(Storage, "create", filled_by_both)
    claim = Claim(str(tmp_path))
    assert claim.number == 2
    claim.check_now()


@given(st.binary() | st.text().map(str.encode) | st.from_type(DriverRecord).map(lambda r: r.model_dump_json().encode()))
def test_any_bytes_are_a_claim_or_none(data: bytes) -> None:
    record = read_driver(data)
    assert record is None or str(record).isprintable()


def test_a_claim_says_who_and_when(tmp_path: Path) -> None:
    Claim(str(tmp_path))
    [path] = (tmp_path / "_job/drivers").iterdir()
    assert json.loads(path.read_text()).keys() == {"token", "host", "pid", "started"}
