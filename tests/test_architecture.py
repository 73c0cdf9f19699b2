"""Checks the architecture: which package and folder may import which, and which modules an import loads."""

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[1]
FILES = {
    p.relative_to(ROOT).as_posix(): p for top in ("model", "pipeline", "workers") for p in (ROOT / top).rglob("*.py")
}

FLOORS = {
    "model": ["errors", "runtime checkpoint", "requests", "kernels", "network", "memory builtin", "engine", "checks"],
    "pipeline": [
        "core",
        "storage",
        "prompts",
        "config",
        "input",
        "planning",
        "output",
        "monitoring maintenance checks",
        "pages",
        "report",
        "driver calibration",
        "preview",
        "cli",
    ],
    "workers": ["units checks", "replica", "cluster"],
}
"""The floors of each package, lowest first. Folders on one line do not import each other. A module that stands beside
the folders (`errors`) is a floor of its own."""
FACES = {"model/__init__.py", "pipeline/__init__.py", "pipeline/__main__.py", "workers/__init__.py"}
"""Files above all floors, which may import all of them. `model/__init__.py` imports names from them on first use."""
MOST_MODULES = 12
"""The most modules in one folder, so that each folder keeps one clear subject."""
COMPOSITION = "pipeline/cli/compose.py"
"""The only file that connects the pipeline with the workers."""

KNOW_RAY = {f"workers/cluster/{name}.py" for name in ("actor", "pool", "connection", "remote", "metrics")}
MODEL_NEEDS = {"torch", "triton", "numpy", "safetensors", "tokenizers", "fsspec", "huggingface_hub", "model"}
FORBIDDEN = {"model": {"ray", "pipeline", "workers"}, "pipeline": {"ray", "torch", "matplotlib"}, "workers": set()}
WITHOUT_TORCH = {"model/__init__.py", "model/errors.py", "model/requests.py"}
WITHOUT_TORCH |= {
    f"model/checkpoint/{name}.py" for name in ("config", "reader", "chat_texts", "tokenizer", "control_tokens")
}
WITHOUT_TORCH |= {f"model/runtime/{name}.py" for name in ("page_allocator", "device_errors")}
WITHOUT_TORCH |= {f"model/engine/{name}.py" for name in ("backend", "loop", "scheduler", "sequence", "stopping")}
# loader.py reads how much memory the machine has; writer.py writes the built-in checkpoints
OPENS_PATHS = {f"model/checkpoint/{name}.py" for name in ("reader", "writer", "loader")}
OPENS_PATHS |= {f"pipeline/storage/{name}.py" for name in ("storage", "local", "scratch")}
# streams.py opens /dev/null for standard streams that are closed, machine.py reads what tells machines apart
OPENS_PATHS |= {f"pipeline/core/{name}.py" for name in ("streams", "machine")}


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


@functools.cache
def imports(name: str) -> list[tuple[str, bool]]:
    """Return (module, True if it is loaded as soon as the file is imported) for every import of a file.

    Imports inside functions have False. Imports for typing only are left out.
    """
    return list(_imports(tree_of(name), name))


def _imports(tree: ast.AST, name: str, at_import: bool = True) -> Iterator[tuple[str, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            yield node.module or "", at_import
        elif not isinstance(node, ast.expr) and not (isinstance(node, ast.If) and is_for_typing(node)):
            yield from _imports(node, name, at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_for_typing(block: ast.If) -> bool:
    return isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"


def tops(name: str) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(name)}


def files_of(package: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"{package}/")]


@pytest.mark.parametrize("package", FLOORS)
def test_packages_keep_to_their_side(package: str) -> None:
    """The model package imports neither ray nor the pipeline. The pipeline imports neither ray nor torch nor
    matplotlib, and workers only inside functions of one file."""
    for name in files_of(package):
        assert not tops(name) & FORBIDDEN[package], name
        if package == "pipeline":
            of_workers = [at_import for module, at_import in imports(name) if module.split(".")[0] == "workers"]
            assert not of_workers or (name == COMPOSITION and not any(of_workers)), name
        if package == "model":
            assert tops(name) <= MODEL_NEEDS | sys.stdlib_module_names, name
        if package == "workers" and name not in KNOW_RAY:
            assert "ray" not in tops(name), name


def floor(name: str) -> tuple[int, str] | None:
    """Return (number of the floor from the bottom, folder) of a file, or None if it stands above all floors."""
    package, folder = name.split("/")[:2]
    place = folder.removesuffix(".py")
    numbers = [number for number, line in enumerate(FLOORS[package]) if place in line.split()]
    assert name in FACES or len(numbers) == 1, f"{name}: {place} is not a floor of {package}"
    return (numbers[0], place) if numbers else None


def internal(name: str) -> Iterator[str]:
    """Yield the files of the same package that a file imports at any time, also by `from package import module`."""
    tree = tree_of(name)
    package = name.split("/")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            path = module.replace(".", "/")
            if path.split("/")[0] == package:
                yield from (file for file in (f"{path}.py", f"{path}/__init__.py") if file in FILES)


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_points_up(package: str) -> None:
    """A folder imports only itself and the folders below it, also inside functions and for typing."""
    for name in files_of(package):
        own = floor(name)
        for other in internal(name) if own else ():
            below = floor(other)
            assert below is not None, f"{name} imports the face of its own package: name the module"
            assert own is not None
            assert below[0] < own[0] or below[1] == own[1], f"{name} imports {other}"


def test_every_floor_is_there() -> None:
    found: dict[str, set[str]] = {}
    for name in FILES:
        if name not in FACES:
            found.setdefault(name.split("/")[0], set()).add(name.split("/")[1].removesuffix(".py"))
    assert found == {
        package: {place for line in floors for place in line.split()} for package, floors in FLOORS.items()
    }


def test_no_folder_is_a_drawer() -> None:
    modules = Counter(name.rpartition("/")[0] for name in FILES if not name.endswith("/__init__.py"))
    assert {folder: count for folder, count in modules.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_planning_needs_of_the_model_is_free_of_torch(name: str) -> None:
    at_import = {module for module, now in imports(name) if now}
    assert not {m for m in at_import if m.split(".")[0] in ("torch", "safetensors")}
    of_model = {m.replace(".", "/") + ".py" for m in at_import if m.startswith("model.")}
    assert of_model <= WITHOUT_TORCH


OPENERS = {
    "open",
    "fdopen",
    "read_text",
    "write_text",
    "read_bytes",
    "write_bytes",
    "url_to_fs",
    "OSFile",
    "memory_map",
}
OPENER_HOMES = ("os", "io", "pa", "Path", "path", "fsspec", "tempfile", "pathlib.Path")


def test_only_storage_and_the_checkpoint_open_paths() -> None:
    """No files but those in OPENS_PATHS, and those of the built-in checkpoints, open paths."""
    others = [name for name in FILES if name not in OPENS_PATHS and not name.startswith("model/builtin/")]
    calls = ((name, node) for name in others for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call))
    for name, node in calls:
        home, _, called = ast.unparse(node.func).rpartition(".")
        opens = called in OPENERS and (home.startswith(OPENER_HOMES) if home else called == "open")
        assert not opens, f"{name}:{node.lineno}"


@pytest.mark.slow  # starts one process per module
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("model", ["torch", "ray", "pipeline"]),
        ("model.engine.loop", ["torch", "numpy", "ray", "pipeline"]),
        ("pipeline.config.loader", ["torch", "ray", "workers", "s3fs", "botocore", "jinja2"]),
        ("pipeline.planning.plan", ["torch", "ray", "workers", "s3fs", "botocore", "aiohttp", "jinja2", "pandas"]),
        ("pipeline.output.ledger", ["torch", "ray", "workers", "s3fs", "botocore", "aiohttp", "jinja2", "pandas"]),
        ("pipeline.driver.run", ["torch", "ray", "workers", "matplotlib", "jinja2"]),
        ("pipeline.calibration.finish", ["torch", "ray", "workers", "matplotlib", "jinja2"]),
        ("pipeline.cli.app", ["torch", "ray", "workers", "pyarrow", "tokenizers"]),
        ("workers.units.runner", ["torch", "ray"]),
        ("workers.replica.replica", ["torch", "ray"]),
        ("workers.replica.bench", ["torch", "ray"]),
        ("workers.checks.devices", ["torch", "ray", "botocore"]),
        ("workers.cluster.checks", ["torch", "ray", "botocore"]),
        ("workers.cluster.metrics", ["torch", "ray"]),
    ],
)
def test_importing_loads_no_more_than_it_must(module: str, unwanted: list[str]) -> None:
    """In a fresh interpreter, importing a module does not load the packages that it must do without.

    Planning and `--help`, for example, must not load torch or Ray.
    """
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == "[]", done.stderr
