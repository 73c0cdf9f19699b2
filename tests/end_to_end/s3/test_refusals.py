"""Tests of answers that refuse: they pass if the store allowed the same before, and the text says what to do."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import StorageError
from pipeline.input.files import list_input
from pipeline.storage import retrying
from pipeline.storage import s3 as s3_module
from pipeline.storage.storage import Storage
from tests.end_to_end.s3.fault_proxy import FaultProxy
from tests.end_to_end.s3.server import KEY, SECRET
from tests.ports import held_ports

pytestmark = [pytest.mark.server]

SAID = {
    "denied": "permission denied; check the rights of the user or of the credentials",
    "expired": r"the credentials have expired \(ExpiredToken\); renew them and submit again",
    "unknown-key": r"the store does not know the access key or token \(InvalidAccessKeyId\); check AWS_ACCESS_KEY_ID",
    "skewed": r"this machine's clock and the store's are too far apart \(RequestTimeTooSkewed\); set the clock",
    "redirect": "the bucket is in another region or at another endpoint; set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL",
}


def calls_of(store: Storage) -> dict[str, Any]:
    return {
        "stat": lambda: store.stat("x"),
        "read": lambda: store.read("x"),
        "read_if_exists": lambda: store.read_if_exists("x"),
        "read_range": lambda: store.read_range("x", 1, 3),
        "read_version": lambda: store.read_version("x", 4),
        "find": store.find,
        "write": lambda: store.write("x", b"data"),
        "create": lambda: store.create("y", b"data"),
        "remove": lambda: store.remove("y"),
    }


@pytest.mark.parametrize("fault", ["denied", "expired", "unknown-key", "skewed"])
def test_a_refusal_passes_where_it_was_allowed_before(s3: str, proxy: FaultProxy, fault: str) -> None:
    """Every operation survives 12 refusals, whatever the first answers were to."""
    store = Storage(s3)
    store.write("x", b"data")
    assert store.read("x") == b"data"
    for call in calls_of(store).values():
        left = [fault] * 12
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proxy, "next_fault", lambda *_, left=left: left.pop() if left else "")
            assert call() is not False
        assert not left


@pytest.mark.parametrize("fault", list(SAID))
def test_a_store_that_never_allowed_it_is_not_waited_for(s3: str, proxy: FaultProxy, fault: str) -> None:
    """Each operation fails at its first refusal, with the text that helps, also if the answer was one to HEAD."""
    proxy.fail_at_random(0, 1.0, [fault])
    store = Storage(s3)
    for name, call in calls_of(store).items():
        with pytest.raises(StorageError, match=SAID[fault]) as caught:
            call()
        assert "tried" not in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_new_credentials_are_found_while_it_is_tried_again(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file with the credentials is written anew while an operation waits: the process need not be started again."""
    from s3fs import S3FileSystem

    Storage(s3).write("x", b"data")
    assert Storage(s3).read("x") == b"data"
    file = tmp_path / "credentials"
    file.write_text("[towers]\naws_access_key_id = old-key\naws_secret_access_key = old-secret\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "towers")
    monkeypatch.setattr(s3_module, "LOOK_EVERY_S", 0.0)
    S3FileSystem.clear_instance_cache()
    seen: list[str] = []

    def renew(*request: str) -> str:
        seen.append(request[0])
        if len(seen) == 3:
            file.write_text(f"[towers]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
        return ""

    monkeypatch.setattr(proxy, "next_fault", renew)
    assert Storage(s3).read_range("x", 0, 4) == b"data"
    assert len(seen) > 3


@pytest.mark.usefixtures("proxy")
def test_nothing_answers(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setattr(retrying, "STRANGER_PATIENCE_S", 0.05)
    with held_ports(1) as [silent_port]:
        silent = f"127.0.0.1:{silent_port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{silent}")
        S3FileSystem.clear_instance_cache()
        with pytest.raises(StorageError, match=f"nothing answers at http://{silent}; does the store run, and is AWS_E"):
            Storage(s3).read("x")
        web = Storage(f"http://{silent}/in")
        for call in (web.kind, lambda: web.read("x"), lambda: list_input(f"http://{silent}/in/*.parquet")):
            with pytest.raises(StorageError, match=f"nothing answers at {silent}; does the store run, and is the add"):
                call()


@pytest.mark.parametrize(("fault", "said"), [("500", "500"), ("denied", "permission denied"), ("reset", "isconnected")])
def test_a_web_server_that_fails_is_not_a_missing_file(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    """fsspec says of http that a file is missing, whatever the answer was."""
    monkeypatch.setattr(retrying, "STRANGER_PATIENCE_S", 0.05)
    proxy.fail_at_random(0, 1.0, [fault])
    store = Storage(f"{proxy.url}/in")
    for call in (lambda: store.stat("x"), lambda: store.read("x"), lambda: store.read_if_exists("x"), store.kind):
        with pytest.raises(StorageError, match=said) as caught:
            call()
        assert "does not exist" not in str(caught.value)
