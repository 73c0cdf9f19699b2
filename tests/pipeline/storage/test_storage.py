"""Tests of storage: a file is whole or not there, a race has one winner, and failures are retried if that can help, or
end in one clear line."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tenacity import stop_after_attempt

from pipeline.core.errors import OutputError, StorageError
from pipeline.output.layout import check_writable
from pipeline.storage import retrying
from pipeline.storage.storage import Storage
from pipeline.storage.urls import credentials_flaw, is_inside, safe_url


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retrying, "LONGEST_WAIT_S", 0.001)
    monkeypatch.setattr(retrying, "_answered", set())


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}-{request.node.name}"


def test_write_read_list_remove(folder: str) -> None:
    store = Storage(folder)
    assert store.find() == []
    assert store.list_files("", "*") == []
    assert store.kind() is None
    store.write("a/b.json", b"one")
    store.write("a/b.json", b"two!")
    store.write("part-1.parquet", b"")
    assert store.kind() == "folder"
    assert store.read("a/b.json") == b"two!"
    assert store.read_range("a/b.json", 1, 3) == b"wo"
    assert store.read_if_exists("absent") is None
    assert store.exists("part-1.parquet")
    assert not store.exists("part-2.parquet")
    assert [info.name for info in store.find()] == ["a/b.json", "part-1.parquet"]
    assert [info.name for info in store.list_files("", "part-*")] == ["part-1.parquet"]
    assert [(info.name, info.size) for info in store.list_files("a", "*.json")] == [("a/b.json", 4)]
    with store.open("a/b.json", 4) as file:
        assert (file.size(), file.read(2), file.seek(3), file.read()) == (4, b"tw", 3, b"!")
    store.remove("a/b.json")
    store.remove("a/b.json")
    assert not store.exists("a/b.json")


def test_create_keeps_what_is_there(folder: str) -> None:
    store = Storage(folder)
    assert store.create("x", b"first")
    assert not store.create("x", b"second")
    assert store.read("x") == b"first"


def race(store: Storage, writers: int) -> list[bool]:
    start, won = threading.Barrier(writers), [False] * writers

    def write(number: int) -> None:
        start.wait()
        won[number] = store.create("x", b"%04d" % number * 5000)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_race_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    store = Storage(str(tmp_path))
    won = race(store, 12)
    assert sum(won) == 1
    assert store.read("x") == b"%04d" % won.index(True) * 5000
    assert os.listdir(tmp_path) == ["x"]  # no temporary file stays


@pytest.mark.parametrize("operation", ["write", "create"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """The disk is full when the content is written. Not even a truncated file stays."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = Storage(str(tmp_path))
    with pytest.raises(StorageError, match=f"cannot {operation} {tmp_path}/x: no space left on device; free some"):
        getattr(store, operation)("x", b"data")
    assert os.listdir(tmp_path) == []


def refused(status: str, code: str) -> OSError:
    """Return an error as s3fs makes it of an answer with this code."""
    error = OSError(errno.EINVAL, "Bad Request") if status == "400" else PermissionError("Forbidden")
    error.__cause__ = ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")
    return error


def failing(times: int, error: OSError, result: Any) -> tuple[Callable[..., Any], list[int]]:
    calls: list[int] = []

    def call(*_: object, **__: object) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return result

    return call, calls


def test_transient_failures_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage("memory://retry")
    store.write("x", b"data")
    call, calls = failing(20, OSError(errno.EBUSY, "Slow down"), b"data")
    monkeypatch.setattr(store._fs, "cat_file", call)
    assert store.read("x") == b"data"
    assert len(calls) == 21


@pytest.mark.parametrize(
    ("error", "again", "said"),
    [
        (
            OSError(errno.EBUSY, "Slow down"),
            True,
            r"cannot read memory://retry/x: Slow down \(tried \d+ times in",
        ),
        (ConnectionResetError("reset by peer"), True, "reset by peer"),
        (TimeoutError(), True, "no whole answer in time"),
        (PermissionError("Access Denied"), False, "permission denied; check the rights"),
        (FileNotFoundError("x"), False, "it does not exist"),
        (OSError(errno.EINVAL, "Bad request"), False, "Bad request$"),
    ],
)
def test_what_is_left_is_one_line(monkeypatch: pytest.MonkeyPatch, error: OSError, again: bool, said: str) -> None:
    store = Storage("memory://retry")
    store.write("x", b"data")
    patience: list[float] = []

    def five_tries(seconds: float) -> stop_after_attempt:
        """Stop after five tries instead of after a time, so that there is a second try however slow the machine is."""
        patience.append(seconds)
        return stop_after_attempt(5)

    monkeypatch.setattr(retrying, "stop_after_delay", five_tries)
    call, calls = failing(10**9, error, b"")
    monkeypatch.setattr(store._fs, "cat_file", call)
    with pytest.raises(StorageError, match=said) as caught:
        store.read("x")
    assert len(calls) == (5 if again else 1)
    assert patience == [retrying.PATIENCE_S]
    assert "\n" not in str(caught.value)


REFUSALS = [PermissionError("Access Denied"), refused("400", "ExpiredToken"), refused("403", "RequestTimeTooSkewed")]


@pytest.mark.parametrize("error", REFUSALS, ids=["denied", "expired", "skewed"])
def test_a_refusal_may_pass_on_a_store_that_allowed_it_before(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Credentials are being renewed. Reading and writing are equally patient."""
    store = Storage("memory://refused")
    store.write("x", b"data")
    assert store.read("x") == b"data"
    for method, call in (("cat_file", lambda: store.read("x")), ("pipe_file", lambda: store.write("x", b"data"))):
        with monkeypatch.context() as patch:
            failed, calls = failing(25, error, b"data")
            patch.setattr(store._fs, method, failed)
            call()
            assert len(calls) == 26


@pytest.mark.parametrize("error", REFUSALS, ids=["denied", "expired", "skewed"])
def test_a_refusal_is_final_on_a_store_that_never_allowed_it(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """A wrong key must not make anybody wait. That reading is allowed says nothing about writing."""
    store = Storage("memory://refused")
    assert not store.exists("absent")
    failed, calls = failing(25, error, None)
    monkeypatch.setattr(store._fs, "pipe_file", failed)
    with pytest.raises(StorageError):
        store.write("x", b"data")
    assert len(calls) == 1


def test_a_refusal_that_stays_ends_after_its_own_patience(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retrying, "REFUSED_PATIENCE_S", 0.1)
    monkeypatch.setattr(retrying, "NOTICE_S", 0.0)
    store = Storage("memory://refused")
    store.write("x", b"data")
    assert store.read("x") == b"data"
    failed, _ = failing(10**9, REFUSALS[0], None)
    monkeypatch.setattr(store._fs, "cat_file", failed)
    with pytest.raises(StorageError, match=r"permission denied; check the rights .*\(tried \d+ times in 0.1 s\)$"):
        store.read("x")
    assert "trying again for up to 0.1 s in all" in caplog.text


def test_a_local_file_without_rights_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(str(tmp_path))
    store.write("x", b"data")
    assert store.read("x") == b"data"
    failed, calls = failing(9, PermissionError(errno.EACCES, "Permission denied"), None)
    monkeypatch.setattr(store._fs, "cat_file", failed)
    with pytest.raises(StorageError, match="permission denied; check the rights of the user"):
        store.read("x")
    assert len(calls) == 1


def test_every_thread_knows_the_stores_that_have_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec gives each thread a file system object of its own."""
    monkeypatch.setattr(retrying, "STRANGER_PATIENCE_S", 0.0)
    Storage("memory://threads").write("x", b"data")
    assert Storage("memory://threads").read("x") == b"data"
    found = []

    def read() -> None:
        store = Storage("memory://threads")
        call, _ = failing(3, OSError(errno.EBUSY, "Slow down"), b"data")
        monkeypatch.setattr(store._fs, "cat_file", call)
        found.append(store.read("x"))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert found == [b"data"]


def test_the_patience_counts_from_the_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the first try takes longer than the patience lasts, so there is no second one."""
    long_ago = SimpleNamespace(monotonic=lambda: time.monotonic() - 2 * retrying.PATIENCE_S)
    monkeypatch.setattr(retrying, "time", long_ago)
    call, calls = failing(10**9, TimeoutError(), None)
    with pytest.raises(StorageError, match=r"^cannot read x: no whole answer in time \(tried 1 times in 300 s\)$"):
        retrying.call_with_retries("cannot read x", retrying.PATIENCE_S, call)
    assert len(calls) == 1


def test_a_failure_that_lasts_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(retrying, "NOTICE_S", 0.005)
    store = Storage("memory://retry")
    store.write("x", b"data")
    call, _ = failing(30, OSError(errno.EBUSY, "Slow down"), b"data")
    monkeypatch.setattr(store._fs, "cat_file", call)
    assert store.read("x") == b"data"
    assert caplog.messages == ["cannot read memory://retry/x: Slow down; trying again for up to 300 s in all"]


@pytest.mark.parametrize("operation", ["read", "read_range", "read_if_exists", "sha256"])
def test_too_few_bytes_are_a_failure_that_may_pass(
    folder: str, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Any store may give a short answer once. The result is whole all the same."""
    store = Storage(folder)
    store.write("x", b"0123456789")
    arguments = {"read_range": (2, 8), "sha256": (10,)}.get(operation, ())
    whole = getattr(store, operation)("x", *arguments)
    cat_file, short = store._fs.cat_file, [True, True]

    def cut(*arguments: Any, **options: Any) -> Any:
        data = cat_file(*arguments, **options)
        return data[:-1] if short and short.pop() else data

    monkeypatch.setattr(store._fs, "cat_file", cut)
    assert getattr(store, operation)("x", *arguments) == whole
    assert not short


def test_a_file_that_became_shorter_is_said_at_once(folder: str) -> None:
    """It is not retried for minutes, because bytes that are not there do not come."""
    store = Storage(folder)
    store.write("x", b"0123")
    with pytest.raises(StorageError, match=r"it has 4 bytes, and bytes up to 6 were asked for: it was replaced"):
        store.read_range("x", 2, 6)
    with pytest.raises(StorageError, match="it has 4 bytes"):
        store.sha256("x", 9)


def test_faults_of_the_program_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage("memory://retry")
    store.write("x", b"data")
    monkeypatch.setattr(store._fs, "cat_file", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.read("x")


def test_check_writable(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new/deeper"))
    assert os.listdir(tmp_path / "new/deeper") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=f"cannot write to output {tmp_path}/file/out"):
        check_writable(str(tmp_path / "file/out"))


def test_check_writable_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no mode bits stop, so the refusal is faked."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "makedirs", denied)
    with pytest.raises(OutputError, match=f"cannot write to output {tmp_path}/out: permission denied"):
        check_writable(str(tmp_path / "out"))


def test_urls_in_messages() -> None:
    assert safe_url("s3://key:secret@bucket/a b?X-Token=1#f") == "s3://bucket/a b"
    assert safe_url("s3://bucket/a#1/b") == "s3://bucket/a#1/b"  # a key may contain a hash sign
    assert safe_url("https://key:secret@host/a?X-Token=1#f") == safe_url("https://host/a#f") == "https://host/a"
    assert safe_url("/plain/path?#x") == "/plain/path?#x"
    assert safe_url("http://key:secret@[x/y?X-Token=1") == "http://[x/y"
    assert safe_url("s3://key:se/cr+et@bucket/a@b") in ("s3://bucket/a@b", "s3://b")  # a slash belongs into %2F
    assert safe_url("s3://key:secret/x") == "s3://…/x"
    for url in ("http://host:80/a:b@c", "http://[::1]:80/a@b", "s3://arn:aws:s3:eu-west-1:1:accesspoint/a/b@c"):
        assert safe_url(url) == url
    assert safe_url("abfs://data@account.dfs.core.windows.net/a") == "abfs://account.dfs.core.windows.net/a"
    assert safe_url('URL: "http://127.0.0.1:1/b/k"') == 'URL: "http://127.0.0.1:1/b/k"'


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYID:Qz1Xy9@bucket/x",
        "s3://KEYID:Qz1/Xy9@bucket/x",
        "s3://Qz1Xy9@bucket/x",
        "S3://KEYID:Qz1Xy9@bucket/x",
        "gcs://user:Qz1Xy9@bucket/x",
        "abfs://user:Qz1Xy9@account/x",
        "oss://KEYID:Qz1Xy9@bucket",
        "s3://KEYID:Qz1Xy9",
        "https://host/x?X-Amz-Signature=Qz1Xy9",
        "https://host/x?sv=1&sig=Qz1Xy9",
        "simplecache::s3://KEYID:Qz1Xy9@bucket/x",
        "s3://KEYID%3AQz1Xy9%40bucket/x",
        "s3://KEYID%3aQz1Xy9",
        "s3:///KEYID:Qz1Xy9@bucket/x",
    ],
)
def test_credentials_in_the_url_of_an_object_store_are_refused(url: str) -> None:
    """This is the one place that every path goes through. botocore would print them as a bucket's name."""
    with pytest.raises(StorageError, match=r"credentials in the environment$|put them into the env") as e:
        Storage(url)
    for secret in ("Qz1", "Xy9", "KEYID"):
        assert secret not in str(e.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b:c/d",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/key",
        "abfs://container@account.dfs.core.windows.net/x",
        "http://user:password@host/x",
        "sftp://user:password@host:22/x",
        "memory://a@b:c/d",
        "/local/s3:/a:b@c",
        "/local/x?sig=1",
    ],
)
def test_other_paths_hold_no_credentials_that_are_refused(url: str) -> None:
    assert credentials_flaw(url) is None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/tmp/a\0b", r"cannot use /tmp/a\\0b: it holds a NUL byte"),
        ("/tmp/\ud800", "cannot look for .*surrogates not allowed"),
        ("zip://x::/nowhere/a.zip", "cannot use zip://x::/nowhere/a.zip: it does not exist"),
        ("s3://", "cannot use s3://: it names no bucket; write s3://bucket/"),
        ("nosuch://[x/y", r"cannot use nosuch://\[x/y: "),
    ],
)
def test_paths_that_cannot_be(url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        Storage(url).kind()
    assert "\n" not in str(caught.value)


def test_two_colons_in_a_local_path_are_no_chain(tmp_path: Path) -> None:
    Storage(f"{tmp_path}/a::{tmp_path}/b").write("x", b"data")
    assert (tmp_path / f"a::{tmp_path}/b/x").read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["a::"]


def test_is_inside() -> None:
    assert is_inside("/a/b", "/a/b/")
    assert is_inside("s3://x/a/b", "s3://x/a")
    assert not is_inside("/a/bc", "/a/b")


def test_a_folder_that_cannot_be_read_is_an_error_not_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is faked, because root may read everything. Rows of a closed folder must not go missing without an
    error."""
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "open" / "a.parquet").write_bytes(b"x")
    assert [info.name for info in Storage(str(tmp_path)).find()] == ["open/a.parquet"]
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(StorageError, match=r"cannot list .*: permission denied"):
        Storage(str(tmp_path)).find()
