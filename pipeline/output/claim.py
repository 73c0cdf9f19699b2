"""Decides which driver owns a job: the driver that started last wins.

A driver claims the output folder when it starts, and ends once it sees the claim of a newer driver, or misses its own
claim twice, because then the folder was removed or moved. A job can therefore be submitted again at any time without a
wait, whether the previous driver is alive or dead. Until the older driver ends, both may work on the job. This does no
harm, because parts are published by exclusive create.
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
from pipeline.output.job_records import plan_digest
from pipeline.output.layout import DRIVERS
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

CHECK_S = 10.0
"""The seconds between two looks for a newer driver."""
TRIES = 100
"""The number of tries to claim a folder, each lost to a faster driver, after which the claim fails."""
LOOKS = 2
"""The number of looks in a row that must miss this driver's claim before the folder counts as gone."""
AGAIN_S = 1.0
"""The seconds after which a look that was asked for is repeated if it has missed this driver's claim."""
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
    numbers = [number for number, size in _claims(storage).items() if size]
    driver = read_driver(storage.read_if_exists(_name(max(numbers))) or b"") if numbers else None
    return None if driver is None else str(driver)


class Claim:
    """This driver's claim on an output folder, and the watch for a newer one.

    The constructor writes the claim and removes older ones. Inside `with claim:` a thread looks for a newer claim every
    `check_s` seconds, and `check` raises once it has found one, or has missed this driver's own claim in two looks. If
    the storage fails in the thread, the thread looks again after `check_s` seconds. The claim file stays when the
    driver ends, so that `status` can name the last driver.
    """

    def __init__(self, output_path: str, *, check_s: float = CHECK_S) -> None:
        """Claim the folder. Raises StorageError if the storage fails, OutputError if other drivers were faster TRIES
        times."""
        self._storage, self._shown, self._check_s = Storage(output_path), safe_url(output_path), check_s
        self.fingerprint: str | None = None
        """The digest of the fingerprint of this driver's job, if it is set, to tell whether a newer driver runs the
        same job."""
        self._end: str | None = None
        """The reason why this driver must end."""
        self._missed = 0
        """The number of looks in a row that have not found this driver's own claim."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="claim", daemon=True)
        self._token = uuid.uuid4().hex
        self._older: frozenset[int] = frozenset()
        self.number = self._take()

    def __enter__(self) -> "Claim":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()  # not joined: it may be waiting for storage

    def check(self) -> None:
        """Raise JobFailed if the thread or `check_now` has seen a newer driver, or that the folder is gone. Does not
        access the storage."""
        if self._end is not None:
            raise JobFailed(self._end)

    def check_now(self) -> None:
        """Look now, and raise JobFailed if there is a newer driver or the folder is gone. Raises StorageError if the
        storage fails."""
        self._look()
        if self._missed and self._end is None:
            self._closed.wait(min(self._check_s, AGAIN_S))
            self._look()
        self.check()

    def _take(self) -> int:
        """Write this driver's claim with the next free number, remove the older claims and return the number."""
        record = DriverRecord(
            token=self._token,
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for _ in range(TRIES):
            known = _claims(self._storage)
            number = max(known, default=0) + 1  # an empty claim, which a killed driver left, keeps its number
            created = self._storage.create(_name(number), record.model_dump_json().encode())
            # Read back, as the answer to the write may be lost, and two drivers may fill a name that was left empty.
            if self._is_mine(number, created=created):
                self._older = frozenset(known)
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
        claims = _claims(self._storage)
        if self._end is not None:
            return
        others = {number for number, size in claims.items() if size} - self._older
        if self.number in claims:
            # This number may be another driver's: the folder was moved, and that driver has begun a new one.
            newer = max(others, default=0) > self.number
            taken, self._missed = newer or not self._is_mine(self.number, created=True), 0
        else:
            taken = bool(others)
        if taken:
            self._end = self._taken_over()
        elif self.number not in claims:
            self._missed += 1
            if self._missed >= LOOKS:
                self._end = self._gone()

    def _is_mine(self, number: int, *, created: bool) -> bool:
        """Return whether the claim with this number is this driver's.

        `created`: whether this driver has created it, which counts if it cannot be read or is gone.
        """
        there = read_driver(self._storage.read_if_exists(_name(number)) or b"")
        return created if there is None else there.token == self._token

    def _taken_over(self) -> str:
        who = newest_driver(self._storage) or "its record cannot be read"
        if self.fingerprint is not None and plan_digest(self._storage) not in (None, self.fingerprint):
            return (
                f"output {self._shown} belongs to another job by now, whose driver took the folder over ({who}); this "
                "driver ends; submit this job with another output.path"
            )
        return (
            f"another driver of this job took over output {self._shown} ({who}); it continues the job and this one "
            "ends; to stop the job, stop that one"
        )

    def _gone(self) -> str:
        there = self._storage.kind() is not None
        said = f"has no {_name(self.number)} any more" if there else "does not exist any more"
        return (
            f"the output folder was removed or moved: output {self._shown} {said}, and nothing is written there from "
            "now on; put it back, or mount its disk again, and submit the same job again"
        )


def _claims(storage: Storage) -> dict[int, int]:
    """Return the size in bytes of each claim, by its number."""
    files = storage.list_files(DRIVERS, "*.json")
    found = ((_NAME.fullmatch(file.name.rpartition("/")[2]), file.size) for file in files)
    return {int(match[1]): size for match, size in found if match}


def _name(number: int) -> str:
    return f"{DRIVERS}/{number:08}.json"
