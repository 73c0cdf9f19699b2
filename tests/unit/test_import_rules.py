"""The layering of the project, read off its own source and off what importing really loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    p.relative_to(ROOT).as_posix(): p for top in ("model", "pipeline", "workers") for p in (ROOT / top).rglob("*.py")
}

KNOW_RAY = {"workers/pool.py", "workers/cluster.py", "workers/ray_bench.py", "workers/metrics.py"}
MODEL_NEEDS = {"torch", "triton", "numpy", "safetensors", "tokenizers", "fsspec", "huggingface_hub", "model"}
FORBIDDEN = {"model": {"ray", "pipeline", "workers"}, "pipeline": {"ray", "torch"}, "workers": set()}
WITHOUT_TORCH = {"model/errors.py", "model/params.py", "model/config.py", "model/checkpoint.py", "model/tokenizer.py"}
WITHOUT_TORCH |= {"model/ending.py", "model/__init__.py", "model/slots.py", "model/lanes.py", "model/scheduler.py"}
WITHOUT_TORCH |= {"model/backend.py", "model/loop.py", "model/repetition.py", "model/faults.py"}
# weights: the memory there is; export: what the makers of the built-in checkpoints write
OPENS_PATHS = {"model/checkpoint.py", "model/export.py", "model/weights.py", "pipeline/storage.py"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) for every import of a file that is not for typing alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or "", id(node) not in lazy


def tops(name: str) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(FILES[name])}


@pytest.mark.parametrize("name", FILES)
def test_packages_keep_to_their_side(name: str) -> None:
    """model knows neither ray nor the pipeline; pipeline knows neither ray nor torch; workers only from the CLI."""
    package = name.split("/")[0]
    assert not tops(name) & FORBIDDEN[package]
    if package == "pipeline":
        of_workers = [at_import for module, at_import in imports(FILES[name]) if module.split(".")[0] == "workers"]
        assert not of_workers or (name == "pipeline/cli.py" and not any(of_workers))
    if package == "model":
        assert tops(name) <= MODEL_NEEDS | sys.stdlib_module_names
    if package == "workers" and name not in KNOW_RAY:
        assert "ray" not in tops(name)


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_planning_needs_of_the_model_is_free_of_torch(name: str) -> None:
    at_import = {module for module, now in imports(FILES[name]) if now}
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


@pytest.mark.parametrize("name", FILES)
def test_only_storage_and_the_checkpoint_open_paths(name: str) -> None:
    """In four files, and in the makers of the built-in checkpoints: nowhere else is a path opened."""
    if name in OPENS_PATHS or name.startswith(("model/tiny/", "model/noise/")):
        return
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Call):
            home, _, called = ast.unparse(node.func).rpartition(".")
            opens = called in OPENERS and (home.startswith(OPENER_HOMES) if home else called == "open")
            assert not opens, f"{name}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("model", ["torch", "ray", "pipeline"]),
        ("model.loop", ["torch", "numpy", "ray", "pipeline"]),
        ("pipeline.jobfile", ["torch", "ray", "workers", "s3fs", "botocore", "jinja2"]),
        ("pipeline.plan", ["torch", "ray", "workers", "s3fs", "botocore", "aiohttp", "jinja2", "pandas"]),
        ("pipeline.ledger", ["torch", "ray", "workers", "s3fs", "botocore", "aiohttp", "jinja2", "pandas"]),
        ("pipeline.run", ["torch", "ray", "workers", "matplotlib", "jinja2"]),
        ("pipeline.calibration.finish", ["torch", "ray", "workers", "matplotlib", "jinja2"]),
        ("pipeline.cli", ["torch", "ray", "workers", "pyarrow", "tokenizers"]),
        ("workers.unit_runner", ["torch", "ray"]),
        ("workers.replica", ["torch", "ray"]),
        ("workers.calibrate", ["torch", "ray"]),
        ("workers.doctor", ["torch", "ray", "botocore"]),
        ("workers.metrics", ["torch", "ray"]),
    ],
)
def test_importing_loads_no_more_than_it_must(module: str, unwanted: list[str]) -> None:
    """In a fresh interpreter: planning and --help start without torch, Ray, and what else they do not need."""
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
