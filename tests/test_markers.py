"""Tests that conftest.py fails a test that starts Ray or a server without the marker, and selects and groups files."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import group_of, markers_of_file, selects

ROOT = Path(__file__).parents[1]
BIND = "import socket\n    with socket.socket() as server:\n        server.bind(('127.0.0.1', 0))"
POPEN = "import subprocess\n    subprocess.run([{!r}, '-c', '', 'pipeline', 'run'], check=True)"


def run(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest, with the conftest of the project's tests, on a file with this text, and return the ended process."""
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def a_test(body: str, marker: str = "") -> str:
    """Return the text of a test file with one test, which has this body and this marker, if any."""
    mark = f"@pytest.mark.{marker}\n" if marker else ""
    return f"import pytest\n\n{mark}def test_it():\n    {body}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "needed", "other"),
    [("import ray", "ray", "server"), (BIND, "server", "slow"), (POPEN.format(sys.executable), "ray", "slow")],
    ids=["import", "bind", "program"],
)
def test_a_test_that_does_not_say_what_it_starts_fails(tmp_path: Path, body: str, needed: str, other: str) -> None:
    for marker in ("", other):
        done = run(tmp_path, a_test(body, marker))
        assert done.returncode == 1, done.stdout
        assert f"mark it with @pytest.mark.{needed}" in done.stdout
    done = run(tmp_path, a_test(body, needed))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_file_that_imports_ray_says_so_for_all_its_tests(tmp_path: Path) -> None:
    refused = run(tmp_path, f"import ray\n{a_test('assert ray', 'ray')}")
    assert refused.returncode != 0
    assert "imports ray: write `pytestmark = pytest.mark.ray` in it" in refused.stdout
    taken = run(tmp_path, f"import pytest\nimport ray\n\npytestmark = pytest.mark.ray\n{a_test('assert ray')}")
    assert taken.returncode == 0, taken.stdout


@pytest.mark.slow
def test_a_file_of_which_nothing_is_selected_is_not_imported(tmp_path: Path) -> None:
    text = f"import pytest\n\npytestmark = pytest.mark.slow\nraise RuntimeError('imported')\n{a_test('pass')}"
    assert run(tmp_path, text, "-m", "not slow").returncode == 5  # pytest's exit code if it collected no test
    assert "imported" in run(tmp_path, text, "-m", "slow").stdout


def test_what_an_expression_selects() -> None:
    quick, costly = "not (ray or server or slow)", "ray or server or slow"
    for names in ({"ray"}, {"server", "slow"}, {"slow"}):
        assert not selects(quick, names)
        assert selects(costly, names)
    assert selects(quick, set())
    assert not selects(costly, set())
    assert selects("gpu and not slow", {"slow"})  # pytest decides about other markers


def test_the_markers_of_a_file_are_read_from_its_text(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]\n\n@pytest.mark.slow\ndef test_it(): ...\n"
    )
    assert markers_of_file(file) == {"ray"}
    assert markers_of_file(file, every=False) == {"ray", "slow"}


def test_files_that_share_a_server_are_one_group() -> None:
    s3 = {group_of(f"tests/end_to_end/s3/{name}.py::test_it") for name in ("test_s3", "test_faults")}
    assert s3 == {"s3"}
    assert group_of("tests/test_markers.py::test_it[a::b]") == "tests/test_markers.py"
