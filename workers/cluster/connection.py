"""The Ray cluster: joined or started, and what its nodes have."""

import json
import os
import signal
import socket
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.core.errors import ClusterError

CONNECT_S = 10.0
OBJECT_STORE_BYTES = 100 << 20
"""For a cluster of our own: only reports go through it."""


def connect() -> bool:
    """Join the cluster at RAY_ADDRESS (a submitted job has it), or start one on this machine for the time of the job.

    Returns whether this call connected, and so whether `ray.shutdown` is ours. Raises ClusterError.
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
        # "local", or Ray would silently join whatever cluster was started on this machine before.
        quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**quiet)
    except SystemExit:  # ray.init() has a handler of its own for SIGTERM: hand the signal on to ours
        signal.alarm(0)  # and one in C++ that aborts the process three seconds later
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
        raise ClusterError("stopped; Ray was still starting; submit the same job again to resume") from None
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be used: {one_line(str(error))}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # Ray raises this very class if a node is not there within 30 s, which no setting raises.
        ray.shutdown()
        raise ClusterError(
            f"Ray did not start on this machine: {one_line(str(error))} See what else keeps the machine busy, then "
            "submit the same job again to resume"
        ) from error
    return True


def check_reachable(address: str) -> None:
    """Raises ClusterError where nobody answers. Ray itself tries that for minutes, with a page of warnings."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ClusterError(
                f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({error}); start it, or unset RAY_ADDRESS "
                "to run on this machine alone"
            ) from error


def print_nodes() -> None:
    """Joins the cluster and prints what its nodes have as JSON; for a process of its own, which may be ended."""
    connect()
    print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))  # type: ignore[no-untyped-call]
    ray.shutdown()


def describe_nodes() -> str:
    """What each node of the cluster has in all, used or not."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    texts = [f"{node['NodeManagerAddress']}: {amounts(node['Resources'])}" for node in nodes]
    return f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} ({'; '.join(texts)})"


def amounts(resources: dict[str, Any]) -> str:
    """GPUs and CPUs as messages show them."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU"))


def one_line(text: str) -> str:
    """Ray's pages of text in one line."""
    return " ".join(text.split())[:1000]
