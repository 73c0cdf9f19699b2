"""Sets up all tests: reproducible random examples, a check of the markers, and the order of the test files.

Three markers say why a test is not part of `make check`: `ray` (starts or imports Ray), `server` (starts a server) and
`slow` (computes or waits for a long time). A test that starts Ray or a server without the marker fails.
"""

import atexit
import contextlib
import gc
import itertools
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.servers import SHARED, ray_cluster, s3_endpoint

__all__ = ["ray_cluster", "s3_endpoint"]  # fixtures

# The tests may run under nohup, whose ignored SIGHUP every process that they start would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# One torch thread here and in every process of the tests: for small operations, more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels run in its interpreter. The variable must be set before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # keeps mamba-ssm from timing variants of its kernels

with contextlib.suppress(ImportError):  # tests/gpu runs on machines without hypothesis
    from hypothesis import settings

    settings.register_profile("project", derandomize=True, deadline=None, database=None)
    settings.load_profile("project")

GROUPS = {
    "s3": ("tests/end_to_end/s3/",),
    "ray": tuple(f"tests/workers/cluster/test_{name}.py" for name in ("pool", "bench", "metrics_endpoint")),
}
"""Name of a group -> the folders and files whose tests run in one process, because they share a cluster or a server
(tests/servers.py). Every other file is a group of its own."""
LONGEST = (
    "tests/chaos/test_scenarios.py",
    "tests/end_to_end/test_job_submit.py",
    "tests/chaos/test_scenarios_on_ray.py",
    "ray",
    "tests/model/engine/test_batching.py",
    "s3",
    "tests/end_to_end/test_local.py",
    "tests/end_to_end/test_run.py",
    "tests/chaos/test_chaos.py",
    "tests/model/engine/test_engine.py",
    "tests/model/engine/test_golden.py",
    "tests/end_to_end/test_readme.py",
    "tests/model/builtin/test_tiny.py",
    "tests/model/engine/test_loop.py",
    "tests/pipeline/prompts/test_templates.py",
    "tests/workers/replica/test_drivers.py",
    "tests/test_architecture.py",
)
"""The groups that take longest, the longest first. They are started in this order, before all others."""
COSTLY = ("ray", "server", "slow")
"""The markers of tests that `make check` leaves out."""
PROGRAMS = {"ray": "ray", "weed": "server"}
"""Name of a program -> the marker that a test needs if it starts this program."""


class Watch:
    """Records which markers the running test needs, from what it imports, which programs it starts and what it binds.

    It is an audit hook of this process, so it does not see what subprocesses do.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        """Needed marker -> what the test did that needs it. Cleared before each test and each file."""

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Handle an audit event (see `sys.addaudithook`). This is called very often and must not raise."""
        if event == "import" and arguments[0] == "ray":
            self.found["ray"] = "imports ray"
        elif event == "subprocess.Popen":
            self._look_at_program(arguments)
        elif event == "socket.bind" and isinstance(arguments[1], tuple):  # a path is a local socket: no marker
            self.found["server"] = f"binds {arguments[1]}"

    def _look_at_program(self, arguments: tuple[object, ...]) -> None:
        """Record the marker for a program of PROGRAMS, and `ray` for `pipeline run` without `--local`."""
        words = arguments[1] if isinstance(arguments[1], list | tuple) else [arguments[0]]
        command = [os.fsdecode(word) for word in words if isinstance(word, str | bytes | os.PathLike)]
        needed = PROGRAMS.get(os.path.basename(command[0]))
        if {"pipeline", "run"} <= set(command) and "--local" not in command:
            needed = "ray"
        if needed:
            self.found[needed] = f"starts {' '.join(command)[:200]}"


WATCH = Watch()
sys.addaudithook(WATCH)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail the collection of a file that loads Ray when it is imported, unless all of its tests are marked `ray`."""
    WATCH.found.clear()
    report = yield
    if isinstance(collector, pytest.Module) and "ray" in WATCH.found and "ray" not in markers_of_file(collector.path):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} imports ray: write `pytestmark = pytest.mark.ray` in it"
    return report


@pytest.fixture(autouse=True)
def _markers_are_true(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that starts Ray or a server without the marker. What its own fixtures start counts as well."""
    WATCH.found.clear()
    yield
    marked = {name for name in COSTLY if request.node.get_closest_marker(name)}
    marked |= {"server"} if "ray" in marked else set()  # Ray starts servers of its own
    for marker in WATCH.found.keys() - marked:
        pytest.fail(f"the test {WATCH.found[marker]}: mark it with @pytest.mark.{marker}")


def markers_of_file(path: Path, *, every: bool = True) -> set[str]:
    """Return the markers in COSTLY that all tests of a file have; if not `every`, those that any of them has.

    The text of the file is searched; the file is not imported.
    """
    text = path.read_text()
    lines = "".join(re.findall(r"^pytestmark = .*$", text, re.MULTILINE)) if every else text
    return {name for name in COSTLY if f"mark.{name}" in lines}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Return True, so that pytest skips the file, if `-m` can select no test in it; else None.

    The file is then not imported. This saves time, because importing torch, Ray and pandas is slow.
    """
    expression = config.option.markexpr
    if not expression or not collection_path.match("test_*.py"):
        return None
    always = markers_of_file(collection_path)
    maybe = markers_of_file(collection_path, every=False) - always
    chosen = itertools.product((True, False), repeat=len(maybe))
    cases = ({name for name, on in zip(maybe, some, strict=True) if on} | always for some in chosen)
    return None if any(selects(expression, names) for names in cases) else True


def selects(expression: str, names: set[str]) -> bool:
    """Return whether an `-m` expression selects a test that has exactly these markers of COSTLY.

    Returns True if the expression names other markers, because then pytest must decide.
    """
    words = re.sub(r"\b(\w+)\b", lambda word: word[0] if word[0] in ("and", "or", "not") else f"_{word[0]}", expression)
    known = {f"_{name}": name in names for name in COSTLY}
    if not re.fullmatch(r"(and|or|not|[\s()]|" + "|".join(known) + ")+", words):
        return True
    return bool(eval(words, {"__builtins__": {}}, known))


@pytest.hookimpl(optionalhook=True)  # tests/gpu runs on machines without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Return a scheduler of xdist that gives all tests of a group to the same process.

    xdist 3.8 has groups of its own, made with a marker, but with pytest 9.2 it splits them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def group_of(nodeid: str) -> str:
    """Return the name of a test's group: that in GROUPS which contains its file, else the path of the file."""
    path = nodeid.partition("::")[0]
    return next((name for name, paths in GROUPS.items() if path.startswith(paths)), path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the longest groups first, so that none of them starts when the others are nearly done."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


def pytest_collection_finish() -> None:
    """Exclude everything that exists now, above all imported modules, from garbage collection, which is then faster. It
    stays in memory anyway."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise some libraries report leaked objects at exit


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Close shared clusters and servers at the end of their group, because idle ones still use processor time."""
    if nextitem is None or group_of(nextitem.nodeid) != group_of(item.nodeid):
        SHARED.close()
