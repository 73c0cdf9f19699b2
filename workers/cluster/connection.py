"""Joins or starts the Ray cluster, and describes the resources of its nodes."""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.core.errors import ClusterError
from pipeline.core.text import counted, one_line

CONNECT_S = 10.0
"""Seconds to wait until something answers at RAY_ADDRESS."""
STARTS = 4
"""The number of times that this process tries to start a node of Ray before it gives up."""
OBJECT_STORE_BYTES = 100 << 20
"""Size of the object store, in bytes, of a cluster started here; it only has to hold small reports."""


def connect(stopped: Callable[[], bool] = lambda: False) -> bool:
    """Join the cluster at RAY_ADDRESS (set in a submitted job), or start one on this machine for the time of the job.

    Return True if this call connected, so that the caller must call `ray.shutdown`; False if this process was connected
    already. `stopped` returns whether the job is being stopped: a start of Ray that failed is then not repeated. Raises
    ClusterError if Ray cannot be joined or started, or if RAY_ADDRESS is a job server.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS is {address}, a job server: use `ray job submit`, or unset it to run on this machine alone"
        )
    if not address:
        # Without "local", Ray would silently join any cluster that was started on this machine before.
        quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _start(quiet, stopped)
    except SystemExit:  # from ray.init()'s own SIGTERM handler: pass the signal on to ours
        signal.alarm(0)  # cancels the alarm by which Ray's C++ handler aborts the process three seconds later
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
        raise ClusterError("stopped; Ray was still starting; submit the same job again to resume") from None
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be used: {ray_text(error)}") from error
    return True


def _start(settings: dict[str, Any], stopped: Callable[[], bool]) -> None:
    """Call `ray.init`, and call it again if a node that it starts here is not ready in time.

    Ray gives its node 30 s, which no setting changes and a busy machine may exceed. It then raises a plain Exception.
    Raises ClusterError after STARTS calls, or after the first one if the job is being stopped.
    """
    for tries_left in reversed(range(STARTS)):
        try:
            ray.init(**settings)
            return
        except Exception as error:
            if type(error) is not Exception:
                raise
            ray.shutdown()
            if stopped() or not tries_left:
                raise ClusterError(
                    f"Ray did not start on this machine: {ray_text(error)} See what else keeps the machine busy; "
                    "submit the same job again to resume"
                ) from error


def check_reachable(address: str) -> None:
    """Raise ClusterError if nothing answers at the address. Ray itself would try for minutes, with many warnings."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ClusterError(
                f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({error}); start it, or unset RAY_ADDRESS "
                "to run on this machine alone"
            ) from error


@contextlib.contextmanager
def lost_cluster(advice: str = "") -> Iterator[None]:
    """Turn a RayError that the `with` block raises into the ClusterError of a lost cluster. `advice` ends its text."""
    try:
        yield
    except RayError as error:
        raise ClusterError(f"the Ray cluster was lost: {ray_text(error)}{advice}") from error


def print_nodes() -> None:
    """Join the cluster and print its nodes' resources as JSON. Meant for a separate process that may be killed."""
    connect()
    print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))  # type: ignore[no-untyped-call]
    ray.shutdown()


def describe_nodes() -> str:
    """Return a text with the total GPUs and CPUs of each node, whether they are in use or not."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    texts = [f"{node['NodeManagerAddress']}: {amounts(node['Resources'])}" for node in nodes]
    return f"{counted(len(nodes), 'node')} ({'; '.join(texts)})"


def amounts(resources: dict[str, Any]) -> str:
    """Return the numbers of GPUs and CPUs in Ray's resources as text such as `2 GPU, 16 CPU`. Others are left out."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU"))


def ray_text(error: object) -> str:
    """Return the text of Ray's error as one line of at most 1000 characters."""
    return one_line(error)[:1000]
