"""Decides which driver owns a job: the driver that started last wins.

A driver claims the output when it starts, and ends once a newer driver has claimed it. So submitting a job again is
always right and never waits, whether the previous driver is alive or dead. Two drivers at the same time do no harm
until then, because parts are published by exclusive create.
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
"""Seconds between two checks for a newer driver."""
TRIES = 100
"""Number of tries to claim the folder, each lost to a faster driver, before the claim is given up."""
_NAME = re.compile(r"(\d{8})\.json")


class DriverRecord(BaseModel):
    """The record of a driver in its claim file."""

    model_config = ConfigDict(frozen=True)

    token: str = Field(max_length=64)
    """Random id of this claim. It shows whether a claim that already exists was written by this driver, whose success
    was not acknowledged, or by another one."""
    host: str = Field(max_length=255)
    pid: int
    started: str = Field(max_length=64)

    def __str__(self) -> str:
        return f"pid {self.pid} on {printable(self.host)}, since {printable(self.started)}"


def read_driver(data: bytes) -> DriverRecord | None:
    """Return the driver recorded in a claim file, or None if it cannot be read."""
    with suppress(ValidationError):
        return DriverRecord.model_validate_json(data)
    return None


def newest_driver(storage: Storage) -> str | None:
    """Return a short text about the driver that claimed an output folder last; None if no claim can be read."""
    numbers = _numbers(storage)
    driver = read_driver(storage.read_if_exists(_name(max(numbers))) or b"") if numbers else None
    return None if driver is None else str(driver)


class Claim:
    """This driver's claim on an output folder.

    Inside `with claim:` a thread looks for a newer driver every few seconds, and `check` raises once there is one. A
    storage failure in the thread only delays this until it looks again.
    """

    def __init__(self, output_path: str, *, check_s: float = CHECK_S) -> None:
        """Claim the folder. Raises StorageError if the storage fails, OutputError if other drivers are always
        faster."""
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
        """Raise JobFailed if a newer driver has been seen. Does not access the storage."""
        if self._successor is not None:
            raise JobFailed(
                f"another driver of this job took over output {self._shown} ({self._successor}); it goes on with the "
                "job and this one ends; to stop the job, stop that one"
            )

    def check_now(self) -> None:
        """Look for a newer driver now and raise JobFailed if there is one. Raises StorageError if the storage fails."""
        self._look()
        self.check()

    def _take(self) -> int:
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
            f"output {self._shown}: {TRIES} other drivers were faster: stop them and submit one job alone"
        )

    def _watch(self) -> None:
        while not self._closed.wait(self._check_s):
            with suppress(StorageError):
                self._look()

    def _look(self) -> None:
        numbers = _numbers(self._storage)
        if self._successor is None and numbers and max(numbers) != self.number:
            self._successor = newest_driver(self._storage) or "which one cannot be read"


def _numbers(storage: Storage) -> list[int]:
    names = [info.name.rpartition("/")[2] for info in storage.list_files(DRIVERS, "*.json")]
    return [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]


def _name(number: int) -> str:
    return f"{DRIVERS}/{number:08}.json"
