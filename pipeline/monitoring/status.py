"""Reads and formats the status of a job for `status OUTPUT`: its progress, its state, its replicas and its errors.

Finished work is read from parts and segments, as `run` does; current activity is read from the driver's live.json.
Whether the driver lives is told by whether live.json changes (pipeline.monitoring.pulse).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.error_kinds import ErrorCount, ErrorKinds
from pipeline.core.errors import StorageError
from pipeline.core.machine import uptime
from pipeline.core.text import counted, duration, printable, time_left, when
from pipeline.monitoring.live import COMPLETE, Live, LiveReplica, read_live
from pipeline.monitoring.pulse import Pulse, take_pulse
from pipeline.output.job_records import Status
from pipeline.output.ledger import Ledger
from pipeline.storage.storage import FileInfo, Storage

State = Literal["complete", "running", "stopped", "dead", "unknown"]
"""The state of a job. complete: `_SUCCESS` and all rows are there. running: its driver reported recently. stopped: its
driver reported why it ended. dead: its driver has stopped reporting without that. unknown: no driver has reported."""
ERROR_PARTS = 16
"""Maximum number of parts whose error rows are read if live.json does not cover all error rows."""
SHOWN_ERRORS = 5
"""Maximum number of error kinds that are shown."""
QUIET_S = 60.0
"""Seconds without a report after which the status mentions that a replica, or the driver's loop, may hang."""
LOOK_S = 1.0
"""Seconds between two looks at live.json while it is not known whether the driver lives."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The status of a job at one moment."""

    folder_at: float
    """Time when parts and segments were read, by the reader's clock, pipeline.core.machine.uptime. While a running job
    is watched, they are read only the first time."""
    folder: Status
    """The finished work, from parts, segments and records."""
    pulse: Pulse
    """The last report of the job's driver, if there is one, and how long ago it was written."""
    error_kinds: tuple[ErrorCount, ...]
    """Error rows by kind, the most frequent kind first."""
    error_parts: int | None
    """Number of parts that `error_kinds` is limited to; None if it covers all known error rows."""

    @property
    def live(self) -> Live | None:
        """Return the last report of the job's driver; None if there is none that can be read."""
        return self.pulse.live

    @property
    def state(self) -> State:
        """Return the state of the job (see State)."""
        if self.folder.complete:
            return "complete"
        if self.live is None:
            return "unknown"
        if self.live.ended is not None:
            return "stopped"
        return "running" if self.pulse.beats else "dead"

    def to_dict(self) -> dict[str, Any]:
        """Return the whole status as a dict for JSON, as `status --json` prints it."""
        age = self.pulse.age
        return {
            "state": self.state,
            "heard_s_ago": None if age is None else round(age, 1),
            "unchanged_s": None if self.live is None else round(self.pulse.unchanged, 1),
            "folder_s_ago": round(self.pulse.at - self.folder_at, 1),
            **asdict(self.folder),
            "error_kinds": [asdict(count) for count in self.error_kinds],
            "error_kinds_of_parts": self.error_parts,
            "live": None if self.live is None else asdict(self.live),
        }


def read_job(
    output_path: str,
    clock: Callable[[], float] = uptime,
    sleep: Callable[[float], None] = time.sleep,
    waiting: Callable[[], None] = lambda: None,
) -> JobStatus:
    """Read the status of a job from its whole output folder.

    If the driver is on another machine and has not said that its run has ended, live.json is looked at until it
    changes, which takes up to INTERVAL_S seconds, or for DEAD_AFTER_S seconds if it does not. `waiting` is called
    before.

    Raises OutputError if the folder is not a job's output, StorageError if the storage fails.
    """
    status = _read_all(output_path, clock, None)
    if not _undecided(status):
        return status
    waiting()
    while _undecided(status):
        sleep(LOOK_S)
        status = _look(output_path, status, clock)
    return status if status.state == "running" else _read_all(output_path, clock, status.pulse)


def look_again(output_path: str, before: JobStatus, clock: Callable[[], float] = uptime) -> JobStatus:
    """Return a newer status. While the job is running only live.json is read again, else the whole folder.

    Raises what read_job raises.
    """
    now = _look(output_path, before, clock)
    if now.state == "running" and before.state == "running":
        return now
    return _read_all(output_path, clock, now.pulse) if now.live else read_job(output_path, clock)


def _read_all(output_path: str, clock: Callable[[], float], before: Pulse | None) -> JobStatus:
    ledger, storage = Ledger(output_path), Storage(output_path)
    # read before the parts, so that a job that ends meanwhile shows as complete, not as stopped with parts missing
    live = read_live(storage, ledger.read_plan().fingerprint.digest)
    pulse = take_pulse(live, clock(), before)
    found = ledger.read_parts()
    folder = ledger.read_status(found)
    if live and _rows(live.error_kinds) >= folder.totals.errors:
        return JobStatus(pulse.at, folder, pulse, live.error_kinds, None)
    bad = [part for part, totals in found.items() if totals.errors]
    kinds = ErrorKinds()
    for part in bad[:ERROR_PARTS]:
        with suppress(StorageError, pa.ArrowException, OSError):  # `verify` reports what is wrong with the part
            _count_errors(storage, part, kinds)
    return JobStatus(pulse.at, folder, pulse, kinds.counts(), ERROR_PARTS if len(bad) > ERROR_PARTS else None)


def _look(output_path: str, before: JobStatus, clock: Callable[[], float]) -> JobStatus:
    """Return the status with a newer pulse. Only live.json is read."""
    live = read_live(Storage(output_path), before.folder.fingerprint)
    now = replace(before, pulse=take_pulse(live, clock(), before.pulse))
    if live and _rows(live.error_kinds) >= _rows(before.error_kinds):  # else the parts have shown more error rows
        now = replace(now, error_kinds=live.error_kinds)
    return now


def _undecided(status: JobStatus) -> bool:
    return not status.folder.complete and status.pulse.undecided


def _count_errors(storage: Storage, part: FileInfo, kinds: ErrorKinds) -> None:
    with storage.open(part.name, part.size) as source:
        columns = ["finish_reason", "error", "source_file", "source_row"]
        for batch in pq.ParquetFile(source, page_checksum_verification=True).iter_batches(
            columns=columns, use_threads=False
        ):
            for row in batch.filter(pc.equal(batch["finish_reason"], pa.scalar("error"))).to_pylist():
                kinds.add(f"{row['source_file']}#{row['source_row']}", str(row["error"]))


def lines(status: JobStatus) -> Iterator[str]:
    """Yield the status as lines for people to read, each with a label of 9 columns. If the job is neither running nor
    complete, the last line says what to do."""
    folder, live = status.folder, status.live
    yield f"state    {_state(status)}"
    if live is not None and status.state == "running":
        yield from _progress(live)
    if status.folder_at == status.pulse.at:
        yield from _parts(folder)
    if folder.driver:
        yield "driver   " + ("last: " if folder.complete else "") + folder.driver
    if live is not None and status.state == "running":
        now = live.time + (status.pulse.age or 0.0)
        yield from (f"replica  {_replica(replica, now)}" for replica in live.replicas)
    if live is not None and not folder.complete:
        yield from (f"slot     {printable(text)}" for text in live.left_out)
    if live is not None and live.replicas_lost and not folder.complete:
        yield f"lost     {counted(live.replicas_lost, 'replica')}, the last: {printable(' '.join(live.losses[-1:]))}"
    yield from _errors(status)
    if folder.complete:
        yield f"complete {folder.finished or 'without a manifest: submit the same job again to write it'}"
    elif status.state != "running":
        yield _what_to_do(status)


def _state(status: JobStatus) -> str:
    if status.live is None or status.state == "complete":
        return status.state if status.folder.complete else "unknown: no driver has reported"
    age, live = status.pulse.age, status.live
    ago = None if age is None else f"{duration(age)} ago"
    of = f"of {_date(live.time)} by the driver's clock"
    match status.state:
        case "running":
            stuck = live.time - live.sampled
            slow = f"; its loop has been stuck for {duration(stuck)}" if stuck > QUIET_S else ""
            return f"running, last report {ago}{slow}"
        case "stopped" if status.live.ended == COMPLETE:  # the folder says otherwise
            return f"stopped {ago}: it was complete then, or another driver took over; now it is not complete"
        case "stopped":
            return f"stopped {ago or f'(a report {of})'}: {printable(live.ended or '')}"
    silent = f"live.json did not change for {duration(status.pulse.unchanged)}"
    return (
        f"dead: last report of its driver {ago}"
        if ago
        else (f"dead: no driver seems to be running: {silent}; its last report is {of}")
    )


def _date(seconds: float) -> str:
    """Return a time in seconds since 1970 for people to read."""
    try:
        return when(datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds"))
    except (ValueError, OverflowError, OSError):
        return "an impossible time"


def _progress(live: Live) -> Iterator[str]:
    share = live.rows / live.total_rows if live.total_rows else 1.0
    yield (
        f"now      {live.rows:,} of {live.total_rows:,} rows ({share:.1%}), units in progress included; "
        f"{live.units:,} of {live.total_units:,} units; {counted(live.errors, 'error')}; ETA {time_left(live.eta_s)}"
    )
    yield f"rate     {live.rows_per_s:,.1f} rows/s, {live.tokens_per_s:,.0f} tokens/s"
    retries = {
        "of forwards": sum(replica.stats.forward_retries for replica in live.replicas),
        "of loops": sum(replica.stats.loop_retries for replica in live.replicas),
        "of storage": live.storage_retries,
        "of units": live.unit_retries,
    }
    if any(retries.values()):
        yield f"retries  {', '.join(f'{count:,} {what}' for what, count in retries.items() if count)}"
    if not live.replicas:
        yield "replica  none is ready: they load the model, or wait for room in the cluster"


def _parts(folder: Status) -> Iterator[str]:
    totals = folder.totals
    outcome = f"{totals.ok:,} ok, {counted(totals.errors, 'error')}"
    yield f"rows     {folder.rows_done:,} of {folder.rows_total:,} ({outcome})"
    if folder.rows_saved and not folder.complete:
        yield f"saved    {counted(folder.rows_saved, 'finished row')} of unfinished units, not to be generated again"
    yield f"units    {folder.units_done:,} of {folder.units_total:,}"
    yield f"tokens   {totals.prompt_tokens:,} prompt, {totals.completion_tokens:,} completion"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(totals.finish_reasons.items()))
    yield f"reasons  rows ended by: {reasons or '-'}"
    yield f"begun    {folder.created}"
    yield from (f"warning  {warning}" for warning in folder.warnings)


def _replica(replica: LiveReplica, now: float) -> str:
    stats, room = replica.stats, replica.stats.room
    said = [
        f"{replica.rows_per_s:,.1f} rows/s",
        f"{replica.tokens_per_s:,.0f} tokens/s",
        f"{stats.active} of {stats.max_rows} rows",
        f"{stats.queue:,} queued",
    ]
    if replica.tokens_per_forward:
        said.append(f"{replica.tokens_per_forward:.1f} tokens/forward")
    if room.pages:
        said.append(f"pages {room.pages_used / room.pages:.0%}")
    if stats.unsaved_rows:
        said.append(f"{counted(stats.unsaved_rows, 'row')} unsaved for {duration(stats.unsaved_s)}")
    if (quiet := now - replica.heard) > QUIET_S:
        said.append(f"SILENT for {duration(quiet)}")
    return f"{printable(replica.name)}: {', '.join(said)}; {printable(replica.doing)}"


def _errors(status: JobStatus) -> Iterator[str]:
    parts = f" (in {status.error_parts} parts; no more were read)" if status.error_parts else ""
    for count in status.error_kinds[:SHOWN_ERRORS]:
        yield f"error    {counted(count.rows, 'row')}{parts}: {printable(count.example)}"
    if len(status.error_kinds) > SHOWN_ERRORS:
        rest = status.error_kinds[SHOWN_ERRORS:]
        yield f"error    {counted(_rows(rest), 'row')} of {counted(len(rest), 'further kind')}"


def _what_to_do(status: JobStatus) -> str:
    if status.folder.rows_done == status.folder.rows_total:
        return "not complete, though all rows are there: submit the same job again to complete it or to learn why not"
    if status.state == "unknown":
        return "not complete: if it is not running, submit the same job again to resume"
    return "not complete: submit the same job again to resume"


def _rows(counts: Sequence[ErrorCount]) -> int:
    return sum(count.rows for count in counts)
