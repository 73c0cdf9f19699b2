"""Writes logs as JSON, one record per line, for machines that read them (`run --log-format json`).

The driver and the replicas log what happens to units and replicas. No record holds a prompt or a completion: quotations
are removed from reasons and notes.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from pipeline.core.error_kinds import without_quotations
from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaLost,
    ReplicaNote,
    ReplicaReady,
    SlotLeftOut,
    UnitDone,
    UnitFailed,
)
from pipeline.core.types import Assignment

LOG = logging.getLogger("twotower")
"""The project's logger, silent until use_json: in text mode pipeline.monitoring.progress prints lines for people."""
LOG.addHandler(logging.NullHandler())
LOG.propagate = False
Record = tuple[int, str, dict[str, Any]]
"""A log record: (level, event name, fields)."""


class JsonLines(logging.Formatter):
    """A formatter that writes a log record as one line of JSON: `ts` (ISO 8601 in UTC), `level`, `event` (the message),
    and the fields that `log` attached."""

    def format(self, record: logging.LogRecord) -> str:
        """See JsonLines."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = getattr(record, "fields", {})
        return json.dumps({"ts": at, "level": record.levelname.lower(), "event": record.getMessage(), **fields})


class _Lines(logging.StreamHandler[TextIO]):
    """A handler that leaves out a record which it cannot write, without a word: stderr is probably where it failed."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name that logging calls)
        """See _Lines."""


def use_json(out: TextIO | None = None) -> None:
    """Log JSON to `out` (default: stderr) in this process; this replaces any earlier destination."""
    handler = _Lines(out or sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)


def is_json() -> bool:
    """Return whether `use_json` was called in this process."""
    return any(isinstance(handler.formatter, JsonLines) for handler in LOG.handlers)


def log(record: Record | None, **more: Any) -> None:
    """Log the record with the fields in `more` added; fields that are None are left out. None as record: do nothing."""
    if record is not None and LOG.isEnabledFor(record[0]):
        level, event, fields = record
        shown = {name: value for name, value in (more | fields).items() if value is not None}
        LOG.log(level, event, extra={"fields": shown})


def work_record(event: str, replica: str, work: Assignment) -> Record:
    """Return a log record about an assignment: replica, unit, attempt, number of rows, and the range if it is one.

    `event` is the name of what happened to it, such as `unit begun`.
    """
    first, end = work.span
    return logging.INFO, event, _about(replica, work) | {"rows": end - first}


def event_record(event: Event | None) -> Record | None:
    """Return the log record of an event from a replica, or None if it only reports progress or there is no event."""
    match event:
        case ReplicaReady(replica):
            return logging.INFO, "replica ready", {"replica": replica}
        case UnitDone(result):
            totals = result.totals
            fields = {"replica": result.replica, "unit": result.unit_id, "attempt": result.attempt}
            counts = {"rows": totals.rows, "errors": totals.errors, "tokens": totals.completion_tokens}
            return logging.INFO, "unit done", {**fields, **counts, "seconds": round(result.seconds, 3)}
        case RangeDone(replica, (unit, rows)):
            return logging.INFO, "range done", {"replica": replica, "unit": unit, "range": rows}
        case UnitFailed(replica, work, reason):
            return logging.WARNING, "unit failed", _about(replica, work) | {"reason": without_quotations(reason)}
        case ReplicaNote(replica, text):
            level = logging.INFO if event.warning is None else logging.WARNING
            return level, "note", {"replica": replica, "text": without_quotations(text)}
        case ReplicaLost(replica, reason):
            level = logging.INFO if event.excused else logging.WARNING
            return level, "replica lost", {"replica": replica, "reason": without_quotations(reason)}
        case SlotLeftOut(slot, reason):
            fields = {"slot": slot, "reason": without_quotations(reason) or None}
            return (logging.WARNING, "slot left out", fields) if reason else (logging.INFO, "slot used again", fields)
    return None


def _about(replica: str, work: Assignment) -> dict[str, Any]:
    fields: dict[str, Any] = {"replica": replica, "unit": work.unit.id, "attempt": work.attempt}
    return fields if work.rows is None else fields | {"range": work.rows}
