"""Tests of files of 0 bytes: on a file system without hard links, a writer that is killed leaves one behind."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import local
from pipeline.storage.storage import Storage


def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(params=["hard links", "no hard links", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(local, "EMPTY_S", 0.05)
    if request.param == "no hard links":
        no_hard_links(monkeypatch)
    return f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path / "out")


def test_an_empty_file_counts_as_absent(folder: str) -> None:
    store = Storage(folder)
    store.write("x", b"")
    assert store.create("x", b"data")
    assert store.read("x") == b"data"
    assert not store.create("x", b"other")
    assert store.read("x") == b"data"


def test_empty_content_does_not_replace_an_empty_file(folder: str) -> None:
    store = Storage(folder)
    assert store.create("x", b"")
    assert not store.create("x", b"")


def test_a_writer_killed_between_name_and_content_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is where a kill left an empty part, which no later run replaced."""
    monkeypatch.setattr(local, "EMPTY_S", 0.05)
    no_hard_links(monkeypatch)
    store = Storage(str(tmp_path))
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise Killed

        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            store.create("x", b"first")
    assert (tmp_path / "x").read_bytes() == b""
    assert store.create("x", b"second")
    assert (tmp_path / "x").read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["x"]


def test_a_writer_that_is_about_to_fill_its_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer sees the empty file, waits, and then leaves the content alone."""
    monkeypatch.setattr(local, "EMPTY_S", 60.0)
    no_hard_links(monkeypatch)
    replace, taken, seen = os.replace, threading.Event(), threading.Event()
    size = local._size

    def slowly(source: str, target: str) -> None:
        taken.set()
        assert seen.wait(60)
        replace(source, target)

    def noticed(path: str) -> int | None:
        if threading.current_thread() is threading.main_thread():
            seen.set()
        return size(path)

    monkeypatch.setattr(os, "replace", slowly)
    monkeypatch.setattr(local, "_size", noticed)
    store, won = Storage(str(tmp_path)), []
    thread = threading.Thread(target=lambda: won.append(store.create("x", b"first")))
    thread.start()
    assert taken.wait(60)
    assert not store.create("x", b"second")
    thread.join()
    assert won == [True]
    assert store.read("x") == b"first"


def test_a_writer_that_was_stopped_after_taking_the_name_does_not_replace_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the name and is stopped for longer than others wait; another one fills the file meanwhile."""
    monkeypatch.setattr(local, "EMPTY_S", 0.05)
    no_hard_links(monkeypatch)
    close, others = os.close, [b"other"]

    def stopped(descriptor: int) -> None:
        close(descriptor)
        if others and (tmp_path / "x").exists():
            assert Storage(str(tmp_path)).create("x", others.pop())

    monkeypatch.setattr(os, "close", stopped)
    assert not Storage(str(tmp_path)).create("x", b"mine")
    assert (tmp_path / "x").read_bytes() == b"other"


def test_of_several_writers_that_fill_an_empty_file_one_wins(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All see it empty. Who finds other content afterwards has lost."""
    monkeypatch.setattr(local, "EMPTY_S", 0.5)
    store = Storage(folder)
    store.write("x", b"")
    start, won = threading.Barrier(6), [False] * 6

    def write(number: int) -> None:
        start.wait()
        won[number] = Storage(folder).create("x", b"%04d" % number * 500)

    threads: list[Any] = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    assert store.read("x") == b"%04d" % won.index(True) * 500
