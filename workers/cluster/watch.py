"""Watches whether the processes are there that a driver cannot do without: the head of the Ray cluster, and Ray on the
driver's own node.

If the head is gone, Ray ends the driver's process by itself after a minute, in the middle of its work and with a text
about "GCS". This watch notices it earlier, so that the job can save its rows and say what to do.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

RAY_PATIENCE_S = 60.0
"""Seconds after which Ray ends a process that cannot reach the head, unless PATIENCE says otherwise."""
PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""The variable by which Ray is told how long to wait for the head, for example where the head can be restarted."""
SHARE = 0.7
"""Share of that time after which this watch gives up, so that the rest is left for saving rows."""
CONNECT_S = 5.0
"""Seconds to wait for an answer."""


def patience_s() -> float:
    """Return the seconds without an answer after which a process counts as gone."""
    try:
        return SHARE * float(os.environ.get(PATIENCE, RAY_PATIENCE_S))
    except ValueError:
        return SHARE * RAY_PATIENCE_S


def answers(host: str, port: int) -> bool:
    """Return whether a process listens at the address."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


class ClusterWatch:
    """A thread that connects to each of some addresses again and again. `lost` says which of them has been silent for
    too long. The thread ends when `connected` returns False."""

    def __init__(self, places: Mapping[str, tuple[str, int]], connected: Callable[[], bool], patience: float) -> None:
        """Begin to watch. `places`: the address of each process, by the words that describe it. `patience`: seconds
        without an answer after which a process is lost."""
        self._places, self._connected, self._patience = dict(places), connected, patience
        self._heard = dict.fromkeys(self._places, time.monotonic())
        self.lost: str | None = None
        """A text about the process that is gone; None while all of them answer."""
        threading.Thread(target=self._run, name="cluster watch", daemon=True).start()

    def _run(self) -> None:
        while self._connected():
            for what, (host, port) in self._places.items():
                if answers(host, port):
                    self._heard[what] = time.monotonic()
                elif (silent := time.monotonic() - self._heard[what]) >= self._patience:
                    self.lost = f"{what} at {host}:{port} has not answered for {silent:.0f} s"
                    return
            time.sleep(self._patience / 10)
