"""Tests infra/Dockerfile and its ignore file, as far as possible without building the image."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

from tests.infra.files import INFRA, ROOT, constraints

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, argument) pairs, with lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, argument.strip()) for name, argument in lines]


def runtime() -> list[tuple[str, str]]:
    """Return the instructions of the last stage."""
    all_of_it = instructions()
    last = max(i for i, (name, _) in enumerate(all_of_it) if name == "FROM")
    return all_of_it[last:]


def workdir() -> str:
    """Return the folder in which the image's processes start."""
    [folder] = [argument for name, argument in runtime() if name == "WORKDIR"]
    return folder


def in_context(name: str) -> bool:
    """Return whether the build sees a file of the repository: the last line of the ignore file that fits decides."""
    seen = True
    for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        paths = [str(path) for path in (PurePosixPath(name), *PurePosixPath(name).parents)]
        pattern_fits = any(fnmatch(path, pattern) or fnmatch(f"/{path}", pattern.replace("**", "*")) for path in paths)
        if pattern_fits:
            seen = line.startswith("!")
    return seen


def test_two_stages_of_one_cuda() -> None:
    """The first stage has nvcc to compile mamba-ssm; the second has the same CUDA without it."""
    stages = [argument for name, argument in instructions() if name == "FROM"]
    assert stages == ["nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build", "nvidia/cuda:${CUDA}-base-ubuntu24.04"]
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0][0] == "ARG"


def test_what_is_copied_is_there_and_the_build_sees_it() -> None:
    copied = [argument.split()[:-1] for name, argument in instructions() if name == "COPY"]
    sources = [source for words in copied for source in words if not words[0].startswith("--from=")]
    assert sources == ["pyproject.toml", "constraints.txt", "README.md", "LICENSE", "."]
    for source in sources[:-1]:
        assert (ROOT / source).is_file()
        assert in_context(source)
    assert [words for words in copied if words[0].startswith("--from=")] == [
        ["--from=build", "/opt/venv"],
        ["--from=build", "/app"],
    ]


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("jobs/synth.yaml", True),
        ("model/builtin/checkpoints/tiny/config.json", True),
        ("pipeline/cli/app.py", True),
        ("workers/cluster/pool.py", True),
        ("pipeline/cli/__pycache__/app.pyc", False),
        (".git/config", False),
        (".env", False),
        (".venv/bin/python", False),
        ("tests/conftest.py", False),
        ("out/demo/part-0.parquet", False),
        ("credentials.json", False),
    ],
)
def test_only_what_runs_goes_in(name: str, seen: bool) -> None:
    assert in_context(name) is seen


def test_jobs_run_as_a_user_with_a_number_in_the_project() -> None:
    """The user is a number, because Kubernetes' runAsNonRoot cannot read names. The smoke check runs as that user,
    after all files are in place."""
    names = [name for name, _ in runtime()]
    [user] = [argument for name, argument in runtime() if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.partition(':')[0]} " in next(a for n, a in runtime() if n == "RUN" and "useradd" in a)
    assert workdir() == "/app"
    assert names.index("WORKDIR") < names.index("USER") < len(names) - 1
    assert ("RUN", "python -m pipeline doctor") in runtime()[names.index("USER") :]


def test_versions_are_those_of_the_project() -> None:
    """Every installation except that of the project itself is constrained, and the whole extra [cuda] is installed."""
    installs = [
        command
        for name, argument in instructions()
        if name == "RUN"
        for command in argument.split("&&")
        if "pip install" in command and "-e ." not in command
    ]
    assert len(installs) == 4
    assert all("-c constraints.txt" in command for command in installs)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cuda"]
    named = {re.match(r"[\w-]+", requirement)[0] for requirement in extra}  # type: ignore[index]
    installed = {word for command in installs for word in command.split()}
    assert named <= installed
    assert "mamba-ssm" in constraints()


def test_no_secret_is_built_in() -> None:
    for name, argument in instructions():
        if name in ("ARG", "ENV"):
            assert not re.search(r"(?i)(secret|password|token|key)\w*=(?!token)", argument), argument
