"""Makes the processes of a job fail in the ways of a broken disk, a sick machine or an unlucky moment.

A scenario switches a fault on and off by a file in a folder, which drivers and replicas look at (`Flags`). The faults
of the disk are raised by an audit hook of Python at the system calls themselves, so they hit whatever code makes them.
"""

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import EngineError

DISK_FULL = "disk-full"
"""While this flag is there, no file below the output can be opened for writing, and no folder made: ENOSPC."""
NO_LINKS = "no-links"
"""While this flag is there, hard links are refused with EPERM, as on SMB, FUSE and Azure Files."""
KILL_AT_FILL = "kill-at-fill"
"""Kills the process with SIGKILL when it is about to fill a file below the output that has no bytes yet, because its
name was only claimed. `skip`: the number of such files that are filled before."""
STOP_AT_FILL = "stop-at-fill"
"""Like KILL_AT_FILL, but the process stops itself with SIGSTOP. `name`: how the file's name begins."""
STOP_BEFORE = "stop-before"
"""Stops the process with SIGSTOP when it is about to give a file below the output its name. `name`: the file's name
without its folder."""
SICK = "sick"
"""While this flag is there, every forward fails. `slot`: only on the replica of this slot, such as r1; "": on all.
`how`: a key of SICKNESSES, `exit` or `kill`."""
SICKNESSES: dict[str, Callable[[], Exception]] = {
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device", "/scratch/kernels"),
    "runtime": lambda: RuntimeError("the device's library has another version than its driver"),
    "memory": lambda: MemoryError("cannot pin 64 MiB"),
    "engine": lambda: EngineError("the device gave no result"),
}
_WRITES = os.O_WRONLY | os.O_RDWR
_installed: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Flags:
    """The folder whose files switch faults on. A file's name is that of the fault, its JSON holds the details."""

    folder: Path

    def set(self, fault: str, **details: object) -> None:
        """Switch a fault on."""
        hidden = self.folder / f".{fault}"
        hidden.write_text(json.dumps(details))
        hidden.replace(self.folder / fault)

    def clear(self, fault: str) -> None:
        """Switch a fault off."""
        (self.folder / fault).unlink(missing_ok=True)

    def read(self, fault: str) -> dict[str, Any] | None:
        """Return the details of a fault; None if it is off."""
        with suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((self.folder / fault).read_text())
            return found
        return None

    def fail_if_sick(self, replica: str) -> None:
        """Raise an error or end this process if the replica of this name is sick."""
        sick = self.read(SICK)
        if sick is None or (sick["slot"] and replica.partition(".")[0] != sick["slot"]):
            return
        if sick["how"] == "exit":
            os._exit(1)
        if sick["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise SICKNESSES[sick["how"]]()


def install(flags: Flags, output: Path) -> None:
    """Let the faults of the disk hit this process at files below the output, as far as the flags switch them on."""
    if flags.folder not in _installed:  # a hook cannot be removed, and one is enough
        _installed.add(flags.folder)
        sys.addaudithook(_Disk(flags, output))


def _stop() -> None:
    """Stop this process before this thread does anything else."""
    # A signal to the process may go to another thread, and this one would run on for a moment.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


class _Disk:
    """An audit hook (see `sys.addaudithook`): an error that it raises is raised by the audited system call."""

    def __init__(self, flags: Flags, output: Path) -> None:
        self._flags, self._below = flags, f"{output}/"
        self._hooks: dict[str, Callable[..., None]] = {
            "open": self._on_open,
            "os.mkdir": self._on_mkdir,
            "os.link": self._on_link,
            "os.rename": self._on_rename,
        }

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if (hook := self._hooks.get(event)) is not None:
            hook(*arguments)

    def _on_open(self, path: object, _mode: object, flags: int) -> None:
        if (name := self._name(path)) is not None and flags & _WRITES:
            self._refuse_if_full(name)
            self._on_fill(name)

    def _on_mkdir(self, path: object, *_: object) -> None:
        if (name := self._name(path)) is not None:
            self._refuse_if_full(name)

    def _on_link(self, source: object, target: object, *_: object) -> None:
        if (name := self._name(target)) is not None:
            if self._flags.read(NO_LINKS) is not None:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(source), None, name)
            self._on_publish(name)

    def _on_rename(self, _source: object, target: object, *_: object) -> None:
        if (name := self._name(target)) is not None:
            self._on_publish(name)
            self._on_fill(name)

    def _on_publish(self, name: str) -> None:
        """Stop this process if it is to stop before the file of this name gets it."""
        wanted = self._flags.read(STOP_BEFORE)
        if wanted is not None and os.path.basename(name) == wanted["name"]:
            self._flags.clear(STOP_BEFORE)
            _stop()

    def _on_fill(self, name: str) -> None:
        """Kill or stop this process if the file of this name is there without bytes, and is to be filled now."""
        if not os.path.exists(name) or os.path.getsize(name):
            return
        stop = self._flags.read(STOP_AT_FILL)
        if stop is not None and os.path.basename(name).startswith(stop["name"]):
            self._flags.clear(STOP_AT_FILL)
            _stop()
        kill = self._flags.read(KILL_AT_FILL)
        if kill is None:
            return
        if not kill["skip"]:
            self._flags.clear(KILL_AT_FILL)
            os.kill(os.getpid(), signal.SIGKILL)
        self._flags.set(KILL_AT_FILL, skip=kill["skip"] - 1)

    def _refuse_if_full(self, name: str) -> None:
        if self._flags.read(DISK_FULL) is not None:
            raise OSError(errno.ENOSPC, "No space left on device", name)

    def _name(self, path: object) -> str | None:
        """Return the path as text if it is below the output, else None."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        name = os.fsdecode(path)
        return name if name.startswith(self._below) else None
