"""Plays each scenario of the chaos suite that needs Ray or an S3 server, once and short."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from s3fs import S3FileSystem

from tests.chaos.harness import environment
from tests.chaos.scenarios.catalogue import SCENARIOS, Scenario
from tests.chaos.scenarios.trial import Place
from tests.end_to_end.s3.fault_proxy import FaultProxy, fault_proxy
from tests.end_to_end.s3.server import BUCKET, aws_variables

pytestmark = [pytest.mark.ray, pytest.mark.server]

ON_RAY = [scenario for scenario in SCENARIOS if scenario.short and scenario.ray]
ON_S3 = [scenario for scenario in SCENARIOS if scenario.short and scenario.s3]


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    """Yield a proxy in front of the S3 server, to which the variables of AWS lead."""
    with fault_proxy(s3_endpoint) as proxy, environment(aws_variables(proxy.url)):
        S3FileSystem.clear_instance_cache()  # instances remember the endpoint that they were made with
        yield proxy
        S3FileSystem.clear_instance_cache()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", ON_RAY, ids=lambda scenario: scenario.name)
def test_the_fault_on_ray_costs_no_row_and_breaks_no_promise(
    scenario: Scenario, ray_cluster: Cluster, tmp_path: Path
) -> None:
    """The docstring of the scenario's function says what the fault is and what is promised (seed 0)."""
    record = scenario.run(Place(tmp_path / "trial", seed=0, address=ray_cluster.address))
    assert record.good, record


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", ON_S3, ids=lambda scenario: scenario.name)
def test_the_fault_of_the_store_costs_no_row_and_breaks_no_promise(
    scenario: Scenario, proxy: FaultProxy, tmp_path: Path
) -> None:
    """The docstring of the scenario's function says what the fault is and what is promised (seed 0)."""
    bucket = f"s3://{BUCKET}/{tmp_path.name.replace('[', '-').replace(']', '-')}"
    record = scenario.run(Place(tmp_path / "trial", seed=0, proxy=proxy, bucket=bucket))
    assert record.good, record
