"""Reads the files of infra/ for the tests."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
IMAGE = "111122223333.dkr.ecr.us-east-1.amazonaws.com/twotower:1"
RAY_JOB, RAY_CRON_JOB = INFRA / "kuberay/rayjob.yaml", INFRA / "kuberay/raycronjob.yaml"


def constraints() -> dict[str, str]:
    """Return package -> version from constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def ray_job_spec(file: Path) -> dict[str, Any]:
    """Return the RayJobSpec of a KubeRay manifest."""
    *_, manifest = yaml.safe_load_all(file.read_text())
    spec: dict[str, Any] = manifest["spec"]
    job: dict[str, Any] = spec.get("jobTemplate", spec)
    return job


def start_options() -> set[str]:
    """Return the options that `ray start` knows, without the dashes."""
    from ray.scripts.scripts import start

    return {option.lstrip("-") for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}


def variables_of(job_file: Path) -> set[str]:
    """Return the variables that a job file uses for its paths."""
    return set(re.findall(r"\$\{(TWOTOWER_\w+)", job_file.read_text()))
