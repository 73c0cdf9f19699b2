"""Tests infra/aws-cluster.yaml by the rules of Ray's own cluster launcher."""

import re
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.config.loader import load_job
from tests.infra.files import IMAGE, INFRA, ROOT, start_options
from tests.infra.test_image import workdir

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "aws-cluster.yaml").read_text())
    return loaded


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []  # nothing is installed


def test_ray_would_find_a_mistake(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster | {"max_worker": 3}))


def test_the_commands_start_ray_in_the_project_with_a_token(cluster: dict[str, Any]) -> None:
    """The commands start Ray in the project's folder with a token, and use only options that `ray start` has."""
    for role, first in (("head", "--head"), ("worker", "--address=$RAY_HEAD_IP:6379")):
        stop, start = cluster[f"{role}_start_ray_commands"]
        assert stop == "ray stop"
        assert start.startswith(f"cd {workdir()} && RAY_AUTH_MODE=token ray start {first} ")
        assert {option.partition("=")[0] for option in re.findall(r"--(\S+)", start)} <= start_options()
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_a_worker_holds_whole_replicas_and_the_head_none(cluster: dict[str, Any]) -> None:
    workers = load_job(ROOT / "jobs/synth.yaml").workers
    head, worker = cluster["available_node_types"]["head"], cluster["available_node_types"]["h100"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert worker["resources"]["GPU"] % workers.gpus == 0
    assert worker["resources"]["CPU"] >= worker["resources"]["GPU"] // workers.gpus * workers.cpus
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["max_workers"] == cluster["max_workers"]
    assert cluster["docker"]["image"] == IMAGE
