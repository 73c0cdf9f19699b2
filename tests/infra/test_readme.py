"""Checks the commands of infra/README.md: each is run by a test, or is listed here with the reason why not."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import commands_of, parse
from tests.infra.files import IMAGE, INFRA, ROOT
from tests.waiting import PATIENCE_S

README = (INFRA / "README.md").read_text()
COMMANDS = commands_of(README)
NOT_HERE = {
    "docker": "needs a Docker daemon and GPUs; tests/infra/test_image.py reads the Dockerfile",
    "aws": "needs an AWS account; tests/infra/test_s3.py gives both files to a real S3 server",
    "helm": "needs a Kubernetes cluster",
    "kubectl": "needs a Kubernetes cluster; tests/infra/test_kuberay.py checks the files",
    "ray up": "starts machines on AWS; tests/infra/test_launcher.py has Ray check the file",
    "ray down": "as ray up",
    "ray dashboard": "as ray up",
    "ray job": "tests/end_to_end/test_job_submit.py submits jobs to a real head",
    "ray metrics": "downloads Prometheus",
    "export": "for the commands after it",
    "sudo systemctl": "needs a machine that systemd runs",
    "systemctl": "as above",
    "journalctl": "as above",
}
HERE = ["ray get-auth-token", "sudo cp", "cp", "python -m pipeline"]  # tests/infra/test_dashboard.py runs cp


def kind_of(command: str) -> str | None:
    known = [start for start in (*NOT_HERE, *HERE) if command.startswith(f"{start} ")]
    return max(known, key=len) if known else None


def test_every_command_is_accounted_for() -> None:
    kinds = [kind_of(command) for command in COMMANDS]
    assert [command for command, kind in zip(COMMANDS, kinds, strict=True) if kind is None] == []
    assert {*NOT_HERE, *HERE} == set(kinds)


@pytest.mark.parametrize("command", [c for c in COMMANDS if kind_of(c) == "sudo cp"])
def test_the_files_are_copied(command: str, tmp_path: Path) -> None:
    for folder in ("systemd/system", "cron.d"):
        (tmp_path / folder).mkdir(parents=True)
    words = shlex.split(command.removeprefix("sudo ").replace("/etc/", f"{tmp_path}/"))
    subprocess.run(words, cwd=ROOT, check=True, timeout=PATIENCE_S)
    assert any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_token_is_made(tmp_path: Path) -> None:
    [command] = [c for c in COMMANDS if kind_of(c) == "ray get-auth-token"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    ray = Path(sys.executable).with_name("ray")
    ray_command = [str(ray), *shlex.split(command)[1:]]
    subprocess.run(ray_command, env=environment, check=True, timeout=PATIENCE_S, capture_output=True)
    assert (tmp_path / ".ray/auth_token").read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if kind_of(c) == "python -m pipeline"])
def test_the_commands_of_the_pipeline_are_ones(command: str) -> None:
    """The verbs and options of the commands parse; tests/infra/test_s3.py runs all four on S3."""
    parse(shlex.split(command)[3:])


def test_the_files_and_names_it_gives_are_there() -> None:
    for path in set(re.findall(r"(?:file://)?(infra/[\w./-]+\.\w+|jobs/\w+\.yaml)", "\n".join(COMMANDS))):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:kuberay|cron)/[\w.]+|systemd/|Dockerfile|aws-cluster\.yaml)`", README):
        assert (INFRA / name).exists(), name
    assert set(re.findall(r"\S+\.dkr\.ecr\.\S+", README)) == {IMAGE}
