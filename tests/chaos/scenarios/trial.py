"""Runs one small job that one fault hits, and finds out whether every row and every promise survived."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from pipeline.config.job import Job
from pipeline.core.errors import TwoTowerError
from pipeline.maintenance.verify import verify
from pipeline.storage.storage import Storage
from tests.chaos.check import compare
from tests.chaos.harness import ROOT
from tests.chaos.logs import Life, heads
from tests.chaos.rows import Prompts, expected, make_prompts, upload
from tests.chaos.sabotage import Flags
from tests.chaos.scenarios.record import Record
from tests.end_to_end.s3.fault_proxy import FaultProxy

T = TypeVar("T")
LIMIT_S = 200.0
"""The seconds after which a run that has not ended counts as one that hangs, and is killed."""
PAUSE_S = 0.01
TURN_S = 0.03
"""The seconds of a turn of the engine, of which a row takes about eight."""
REPLICAS = 2
FIRST_ROWS_BYTES = 600
"""If a run has added more bytes than this to the logs, rows have ended: the first lines of the logs are shorter."""
LEFT_OVER = " with `clean`"
"""The end of what `verify` says about files that a dead or replaced run has left behind, which do no harm."""

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tests.chaos.driver", "pipeline.report.write"])


class GaveUp(Exception):  # noqa: N818 (it says what happened)
    """A scenario could not go on, because a run ended before its fault could hit it, or never ended."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place where a scenario runs."""

    folder: Path
    """An empty folder for everything that it writes."""
    seed: int
    address: str = ""
    """The address of a Ray cluster with room for REPLICAS replicas; "" if the scenario needs none."""
    proxy: FaultProxy | None = None
    """The proxy in front of the S3 server; None if the scenario needs none. The variables of AWS lead to it."""
    bucket: str = ""
    """The URL of an empty folder on the S3 server."""
    long: bool = False
    """Whether the fault lasts as long as its description says; otherwise only so long that it shows."""


@dataclass(slots=True)
class Driver:
    """A process that runs the job once."""

    pid: int
    poll: Callable[[], int | None]
    """Returns the exit code (below 0: the signal that killed it), or None while it runs."""
    log: Path
    """The file of what it prints."""

    def wait(self) -> int:
        """Return the exit code. Raises GaveUp if the process does not end; it is killed then."""
        deadline = time.monotonic() + LIMIT_S
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                self.kill()
                raise GaveUp(f"a run did not end within {LIMIT_S:g} s: {self.tail()}")
            time.sleep(PAUSE_S)
        return code

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process with SIGKILL, and wait for that."""
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(PAUSE_S)

    def stopped(self) -> bool:
        """Return whether SIGSTOP has stopped the process."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].startswith("T")

    def said(self) -> str:
        """Return everything that the process has printed so far."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """Return the end of what it has printed."""
        return self.said()[-600:].strip()


@dataclass(slots=True)
class Trial:
    """One job with its input, its output folder and its expected rows, and the runs of it so far."""

    place: Place
    record: Record
    rng: Random
    job: dict[str, Any]
    prompts: list[Prompts]
    flags: Flags
    options: Mapping[str, Any]
    """The options of the input files (Prompts.parquet)."""
    runs: list[Driver] = field(default_factory=list)
    turn_s: float = TURN_S

    @classmethod
    def of(
        cls, place: Place, fault: str, rows: int = 240, files: int = 3, *, options: Mapping[str, Any] | None = None
    ) -> "Trial":
        """Make the input of `rows` rows in as many large files, and the settings of the job. It writes to a local
        folder. Its input lies on the S3 server, if the place has one. `options`: see Prompts.parquet."""
        for name in ("logs", "flags", "said"):
            (place.folder / name).mkdir(parents=True)
        inputs = f"{place.bucket}/in" if place.bucket else str(place.folder / "in")
        prompts = make_prompts(rows, files, place.seed, killers=0)
        upload(Storage(inputs), prompts, **(options or {}))
        job = {
            "name": "chaos",
            "input": {"path": inputs},
            "output": {"path": str(place.folder / "out"), "rows_per_file": 20},
            "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
            "generation": {"max_new_tokens": 48},
            "workers": {"gpus": 0, "cpus": 1, "replicas": REPLICAS, "start_timeout_s": 100.0},
            "flush": {"seconds": 0.2},
            "retry": {"attempts": 3},
        }
        rng = Random(repr((fault, place.seed)))
        return cls(place, Record(fault, tried=1), rng, job, prompts, Flags(place.folder / "flags"), options or {})

    @property
    def output(self) -> Path:
        """Return the output folder, which must be a local one."""
        return Path(self.job["output"]["path"])

    @property
    def logs(self) -> Path:
        """Return the folder of the replicas' logs."""
        return self.place.folder / "logs"

    def extend(self, rows: int, files: int) -> None:
        """Add files to the input, and let the job take them."""
        more = make_prompts(rows, files, self.place.seed + 1_000, killers=0)
        added = [Prompts(f"more-{number}-{file.name}", file.cells) for number, file in enumerate(more)]
        upload(Storage(self.job["input"]["path"]), added, **self.options)
        self.prompts += added
        self.job["input"]["on_change"] = "extend"

    def submit(self) -> Driver:
        """Start a run of the job: on Ray if the place has a cluster, else with one replica in the driver's process."""
        number = len(self.runs) + 1
        job_file = self.place.folder / f"job-{number}.json"
        job_file.write_text(Job.model_validate(self.job).model_dump_json())
        log = self.place.folder / "said" / f"{number}.log"
        start = _start_on_ray if self.place.address else _start_locally
        driver = start(self, job_file, log, number)
        self.runs.append(driver)
        return driver

    def run(self) -> Driver:
        """Run the job once to its end, and return its driver. Raises GaveUp if it never ends."""
        driver = self.submit()
        driver.wait()
        return driver

    def submit_until(self, met: Callable[[], T]) -> Driver:
        """Start a run, wait until the condition is true, and return its driver, which is running then."""
        driver = self.submit()
        self.wait_for(driver, met)
        return driver

    def wait_for(self, driver: Driver, met: Callable[[], T]) -> T:
        """Wait until the condition is true, and return its result. Raises GaveUp if the driver ends before."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            code = driver.poll()  # before the condition, so that what it did just before its end counts
            if found := met():
                return found
            if code is not None or time.monotonic() >= deadline:
                raise GaveUp(f"a run ended too early (exit code {code}): {driver.tail()}")
            time.sleep(PAUSE_S)

    def parts(self) -> list[Path]:
        """Return the parts so far, without the claimed names of some that have no bytes yet."""
        return [path for path in sorted(self.output.glob("part-*.parquet")) if path.stat().st_size]

    def segments(self) -> list[Path]:
        """Return the segments so far."""
        return sorted(self.output.glob("_job/segments/*/*.parquet"))

    def under_way(self) -> bool:
        """Return whether there are parts and segments, so that the run is in the middle of its work."""
        return len(self.parts()) >= 2 and bool(self.segments())

    def rows_end(self) -> bool:
        """Return whether rows have ended in the last run, whether or not they are saved."""
        return self.log_bytes() > FIRST_ROWS_BYTES

    def log_bytes(self, slot: str = "") -> int:
        """Return the size of the logs of the last run, or of one slot of it. It grows with every step."""
        return sum(path.stat().st_size for path in self.logs.glob(f"{len(self.runs)}_{slot}*"))

    def lives(self, slot: str) -> list[Life]:
        """Return the processes of one slot in the last run, as far as their logs have begun."""
        return [life for life in heads(self.logs, len(self.runs)) if life.slot == slot]

    def promise(self, kept: bool, text: str) -> None:
        """Record that a promise is broken, unless it is kept. `text` says what happened instead."""
        if not kept:
            self.record.said.append(text)

    def finish(self, submissions: int = 1) -> Record:
        """Submit the job until it is complete, at most so many times, and return the record with all findings."""
        while (driver := self.run()).poll() != 0:
            submissions -= 1
            if not submissions:
                self.promise(False, f"submitting again does not help: {driver.tail()}")
                break
        return self.judge()

    def judge(self) -> Record:
        """Compare the output with the expected rows, run `verify`, and return the record."""
        record = self.record
        output = self.job["output"]["path"]
        record.add_rows(compare(output, expected(self.prompts)))
        try:
            problems = verify(output).problems
        except TwoTowerError as error:
            problems = (str(error),)
        record.said += [f"verify: {text}" for text in problems if not text.endswith(LEFT_OVER)]
        right = not any((record.lost, record.doubled, record.changed, record.condemned))
        record.survived = int(right and not record.said)
        return record

    def close(self) -> None:
        """End the runs that are left."""
        for driver in self.runs:
            driver.kill()


def _start_locally(trial: Trial, job_file: Path, log: Path, number: int) -> Driver:
    """Start a driver by forking a process that has imported everything, which takes no time."""
    arguments = (job_file, trial.logs, number, trial.turn_s, trial.flags, log, dict(os.environ))
    process = _forkserver.Process(target=_drive, args=arguments, daemon=True)
    process.start()
    assert process.pid is not None
    return Driver(process.pid, lambda: process.exitcode, log)


def _drive(
    job_file: Path, logs: Path, number: int, turn_s: float, flags: Flags, log: Path, environment: dict[str, str]
) -> None:
    """Run the job in this process, which prints to the log from now on, and end it with the exit code."""
    from tests.chaos.driver import drive

    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(drive(job_file, logs, number, turn_s, local=True, flags=flags))


def _start_on_ray(trial: Trial, job_file: Path, log: Path, number: int) -> Driver:
    command = [sys.executable, "-m", "tests.chaos.driver", str(job_file), str(trial.logs), str(number)]
    command += [str(trial.turn_s), str(trial.flags.folder)]
    environment = os.environ | {"RAY_ADDRESS": trial.place.address}
    with log.open("ab") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
    return Driver(process.pid, process.poll, log)
