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
from pipeline.core.limits import is_limit, limit_advice, limit_text
from pipeline.core.text import counted, one_line
from workers.cluster.watch import ClusterWatch, patience_s

CONNECT_S = 10.0
"""Seconds to wait until something answers at RAY_ADDRESS."""
STARTS = 4
"""The number of times that this process tries to start a node of Ray before it gives up."""
OBJECT_STORE_BYTES = 100 << 20
"""Size of the object store, in bytes, of a cluster started here; it only has to hold small reports."""
GONE = (
    "it was killed, often because memory ran out, or its node is gone: `dmesg`, the pod's status or Ray's logs there "
    "tell; start the cluster again if it does not come back, and submit the same job again to resume"
)
"""What to do if a process is gone without which Ray does not work."""
_watches: list[ClusterWatch] = []
"""The watch over the cluster that this process is connected to, because a process has one connection to Ray."""


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
    except (RayError, OSError, RuntimeError, ValueError, MemoryError) as error:
        said = limit_text(error) if is_limit(error) else ray_text(error)
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be used: {said}") from error
    _watches[:] = _watch_cluster()
    return True


def _start(settings: dict[str, Any], stopped: Callable[[], bool]) -> None:
    """Call `ray.init`, and call it again if a node that it starts here is not ready in time.

    Ray gives its node 30 s, which no setting changes and a busy machine may exceed. It then raises a plain Exception.
    Raises ClusterError after STARTS calls, or after the first one if the job is being stopped.
    """
    for tries_left in reversed(range(STARTS)):
        try:
            with _hang_up_blocked():
                ray.init(**settings)
            return
        except Exception as error:
            if type(error) is not Exception:
                raise
            ray.shutdown()
            if stopped() or not tries_left:
                said = f"{ray_text(error)}{limit_advice(str(error))}"
                raise ClusterError(
                    f"Ray did not start on this machine: {said} See what else keeps the machine busy; submit the same "
                    "job again to resume"
                ) from error


@contextlib.contextmanager
def _hang_up_blocked() -> Iterator[None]:
    """Block SIGHUP while the `with` block runs. The processes that start in it, Ray's and the replicas, keep it
    blocked.

    A terminal that hangs up sends SIGHUP to all processes of a job. Only the driver may act on it: it then lets the
    replicas save their rows. If it comes while Ray starts, the driver gets it at the end of the block. Ray does the
    same with SIGINT.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP} - before)


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


def _watch_cluster() -> Iterator[ClusterWatch]:
    """Yield a watch over the head and over Ray on this node. Yield none if Ray does not say where they are, as a client
    at a `ray://` address."""
    with contextlib.suppress(Exception):  # the watch only helps: a job must run without it as well
        context = ray.get_runtime_context()
        head, _, port = context.gcs_address.rpartition(":")
        places = {"the head of the Ray cluster (GCS)": (head.strip("[]"), int(port))}
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["NodeID"] == context.get_node_id():
                places["Ray on this node (raylet)"] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
        yield ClusterWatch(places, ray.is_initialized, patience_s())


def cluster_gone() -> str | None:
    """Return a text about the process of the cluster that has not answered for too long; None if all of them do. After
    that, calls to Ray other than those to replicas would hang."""
    return _watches[0].lost if _watches and ray.is_initialized() else None


def check_cluster() -> None:
    """Raise ClusterError if the head of the cluster, or Ray on this node, is gone."""
    if gone := cluster_gone():
        raise ClusterError(f"the Ray cluster was lost: {gone}; {GONE}")


@contextlib.contextmanager
def lost_cluster(advice: str = "") -> Iterator[None]:
    """Turn a RayError that the `with` block raises into the ClusterError of a lost cluster. `advice` ends its text.

    Raises ClusterError before the block if the cluster is gone (see check_cluster).
    """
    check_cluster()
    try:
        yield
    except RayError as error:
        said = ray_text(error)
        raise ClusterError(f"the Ray cluster was lost: {said}{limit_advice(said)}{advice}") from error


def shutdown() -> None:
    """Disconnect from Ray. If the cluster is gone, leave that to the end of the process, because it would hang."""
    if cluster_gone() is None:
        ray.shutdown()


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
