"""Decides which driver owns a job: the driver that started last wins.

A driver claims the output folder when it starts, and ends once it sees the claim of a newer driver. A job can
therefore be submitted again at any time without a wait, whether the previous driver is alive or dead. Until the older
driver ends, both may work on the job. This does no harm, because parts are published by exclusive create.
"""

import os
import re
import socket
import threading
import uuid
from contextlib import suppress
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import JobFailed, OutputError, StorageError
from pipeline.core.text import printable
from pipeline.output.layout import DRIVERS
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

CHECK_S = 10.0
"""The seconds between two looks for a newer driver."""
TRIES = 100
"""The number of tries to claim a folder, each lost to a faster driver, after which the claim fails."""
_NAME = re.compile(r"(\d{8})\.json")


class DriverRecord(BaseModel):
    """The content of a claim file: which process claimed the output folder, and when.

    As text it is `pid 7 on host, since …`.
    """

    model_config = ConfigDict(frozen=True)

    token: str = Field(max_length=64)
    """A random id of this claim. If the file exists already, the id shows who wrote it: this driver, if the store did
    not confirm its write, or another one."""
    host: str = Field(max_length=255)
    pid: int
    started: str = Field(max_length=64)
    """The time of the claim, ISO 8601 in UTC."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {printable(self.host)}, since {printable(self.started)}"


def read_driver(data: bytes) -> DriverRecord | None:
    """Return the record in the bytes of a claim file, or None if they hold no such record."""
    with suppress(ValidationError):
        return DriverRecord.model_validate_json(data)
    return None


def newest_driver(storage: Storage) -> str | None:
    """Return a text about the driver that claimed an output folder last: its pid, host and time (see DriverRecord).

    Returns None if there is no claim, or if the newest one cannot be read as a record.
    """
    numbers = _numbers(storage)
    driver = read_driver(storage.read_if_exists(_name(max(numbers))) or b"") if numbers else None
    return None if driver is None else str(driver)


class Claim:
    """This driver's claim on an output folder, and the watch for a newer one.

    The constructor writes the claim and removes older ones. Inside `with claim:` a thread looks for a newer claim every
    `check_s` seconds, and `check` raises once it has found one. If the storage fails in the thread, the thread looks
    again after `check_s` seconds. The claim file stays when the driver ends, so that `status` can name the last driver.
    """

    def __init__(self, output_path: str, *, check_s: float = CHECK_S) -> None:
        """Claim the folder. Raises StorageError if the storage fails, OutputError if other drivers were faster TRIES
        times."""
        self._storage, self._shown, self._check_s = Storage(output_path), safe_url(output_path), check_s
        self._successor: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="claim", daemon=True)
        self.number = self._take()

    def __enter__(self) -> "Claim":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()  # not joined: it may be waiting for storage

    def check(self) -> None:
        """Raise JobFailed if the thread or `check_now` has seen a newer driver. Does not access the storage."""
        if self._successor is not None:
            raise JobFailed(
                f"another driver of this job took over output {self._shown} ({self._successor}); it continues the job "
                "and this one ends; to stop the job, stop that one"
            )

    def check_now(self) -> None:
        """Look for a newer driver now and raise JobFailed if there is one. Raises StorageError if the storage fails."""
        self._look()
        self.check()

    def _take(self) -> int:
        """Write this driver's claim with the next free number, remove the older claims and return the number."""
        record = DriverRecord(
            token=uuid.uuid4().hex,
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for _ in range(TRIES):
            known = _numbers(self._storage)
            number = max(known, default=0) + 1
            name = _name(number)
            mine = self._storage.create(name, record.model_dump_json().encode())
            if not mine:
                there = read_driver(self._storage.read_if_exists(name) or b"")
                mine = there is not None and there.token == record.token
            if mine:
                for old in known:
                    with suppress(StorageError):  # `clean` removes it later
                        self._storage.remove(_name(old))
                return number
        raise OutputError(
            f"output {self._shown}: other drivers were faster {TRIES} times; stop them and submit the job only once"
        )

    def _watch(self) -> None:
        while not self._closed.wait(self._check_s):
            with suppress(StorageError):
                self._look()

    def _look(self) -> None:
        numbers = _numbers(self._storage)
        if self._successor is None and numbers and max(numbers) != self.number:
            self._successor = newest_driver(self._storage) or "its record cannot be read"


def _numbers(storage: Storage) -> list[int]:
    names = [info.name.rpartition("/")[2] for info in storage.list_files(DRIVERS, "*.json")]
    return [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]


def _name(number: int) -> str:
    return f"{DRIVERS}/{number:08}.json"
