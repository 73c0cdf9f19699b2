"""Tests that infra/kuberay is valid for KubeRay and Kubernetes, and fits the jobs that it runs."""

import json
import re
import zoneinfo
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.config.loader import load_job
from tests.infra.files import (
    IMAGE,
    INFRA,
    RAY_CRON_JOB,
    RAY_JOB,
    ROOT,
    constraints,
    ray_job_spec,
    start_options,
    variables_of,
)
from workers.replica.replica import FLUSH_S, LEAVE_S, ReplicaProcess

BOTH = pytest.mark.parametrize("file", [RAY_JOB, RAY_CRON_JOB], ids=["RayJob", "RayCronJob"])
SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
KUBERNETES = "1.33"


def pods_of(file: Path) -> dict[str, dict[str, Any]]:
    """Return the pod templates of the head and of the workers."""
    cluster = ray_job_spec(file)["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "workers": workers["template"]}


def variables(file: Path) -> dict[str, str]:
    runtime_env = yaml.safe_load(ray_job_spec(file)["runtimeEnvYAML"])
    assert runtime_env.keys() == {"env_vars"}
    return dict(runtime_env["env_vars"])


def test_the_manifests_hold_fields_of_kuberay_and_kubernetes_alone() -> None:
    kinds = []
    for file in (RAY_JOB, RAY_CRON_JOB):
        for manifest in yaml.safe_load_all(file.read_text()):
            kinds.append(manifest["kind"])
            if manifest["apiVersion"] == "v1":
                kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            else:
                jsonschema.validate(manifest, SCHEMA)
        for template in pods_of(file).values():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
            kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)
    assert kinds == ["ServiceAccount", "RayJob", "RayCronJob"]


@pytest.mark.parametrize("where", ["spec", "rayClusterSpec", "workerGroupSpecs"])
def test_a_field_that_kuberay_does_not_have_is_found(where: str) -> None:
    manifest = yaml.safe_load(RAY_CRON_JOB.read_text())
    spec = manifest["spec"]
    cluster = spec["jobTemplate"]["rayClusterSpec"]
    {"spec": spec, "rayClusterSpec": cluster, "workerGroupSpecs": cluster["workerGroupSpecs"][0]}[where]["typo"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_both_files_describe_the_same_cluster_but_for_the_job() -> None:
    one, nightly = ray_job_spec(RAY_JOB), ray_job_spec(RAY_CRON_JOB)
    assert {key for key in one | nightly if one.get(key) != nightly.get(key)} == {"entrypoint", "runtimeEnvYAML"}
    assert variables(RAY_JOB).keys() == variables(RAY_CRON_JOB).keys()


@BOTH
def test_the_cluster_fits_the_job(file: Path) -> None:
    """A pod holds at least one replica with no GPU left over, every variable of the job file is set, and the driver
    needs no resources of its own."""
    spec = ray_job_spec(file)
    job_file = ROOT / spec["entrypoint"]
    assert variables_of(job_file) <= variables(file).keys()
    workers = load_job(job_file).workers
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    replicas, left_over = divmod(int(limits["nvidia.com/gpu"]), workers.gpus)
    assert (replicas >= 1, left_over) == (True, 0)
    assert int(limits["cpu"]) >= replicas * workers.cpus
    assert (group["minReplicas"], group["replicas"]) == (0, 0)
    assert group["maxReplicas"] >= 1
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert not spec.keys() & {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"}


@BOTH
@pytest.mark.ray
def test_versions_images_and_start_options(file: Path) -> None:
    spec = ray_job_spec(file)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == constraints()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert {pod["spec"]["containers"][0]["image"] for pod in pods_of(file).values()} == {IMAGE}
    assert spec["metadata"] == {"image": IMAGE}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["rayStartParams"].keys() <= start_options()


@BOTH
def test_a_stop_has_time_to_flush(file: Path) -> None:
    """Ray waits at least as long as a replica needs, the hook as long as Ray, and Kubernetes longer than the hook."""
    ray_waits = int(variables(file)["RAY_JOB_STOP_WAIT_TIME_S"])
    assert ray_waits >= FLUSH_S + LEAVE_S
    for pod in pods_of(file).values():
        [hook] = [c["lifecycle"]["preStop"]["exec"]["command"] for c in pod["spec"]["containers"]]
        assert hook[:2] == ["bash", "-c"]
        seconds = re.search(r"\{1\.\.(\d+)\}", hook[2])
        assert seconds is not None
        assert ray_waits <= int(seconds[1]) < pod["spec"]["terminationGracePeriodSeconds"] < 120  # s of a spot notice
        patterns = dict(re.findall(r"(\w+)='(.*?)'", hook[2]))
        # The title that Ray gives the process of an actor, and the command by which the job file's shebang starts the
        # driver.
        shebang = (ROOT / "jobs/synth.yaml").read_text().splitlines()[0].removeprefix("#!/usr/bin/env -S ")
        assert re.search(patterns["replica"], f"ray::{ReplicaProcess.__name__}.work")
        assert re.search(patterns["driver"], f"{shebang} jobs/synth.yaml")
        assert not any(re.search(pattern, f"bash -c {hook[2]}") for pattern in patterns.values())  # not the hook itself


@BOTH
def test_pods_have_no_more_rights_than_they_need(file: Path) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    for pod in pods_of(file).values():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"]
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user[1]), int(user[2]))
        for container in pod["spec"]["containers"]:
            allowed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == allowed
        assert pod["spec"]["serviceAccountName"] == "twotower"
    assert pods_of(file)["workers"]["spec"]["automountServiceAccountToken"] is False
    assert not re.search(r"AWS_(ACCESS|SECRET)|auth_token", file.read_text())


def test_the_schedule_is_one() -> None:
    spec = yaml.safe_load(RAY_CRON_JOB.read_text())["spec"]
    zoneinfo.ZoneInfo(spec["timeZone"])
    minute, hour, *days = spec["schedule"].split()
    assert (int(minute) < 60, int(hour) < 24, days) == (True, True, ["*", "*", "*"])
