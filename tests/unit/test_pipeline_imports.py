"""The borders of `pipeline`: no engine, no cluster, and one module that opens paths."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "pipeline").glob("*.py"))
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


def loaded_by(code: str) -> set[str]:
    code += "\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_no_module_of_the_pipeline_loads_torch_ray_or_workers() -> None:
    names = [f"pipeline.{file.stem}" for file in MODULES if file.stem not in ("__init__", "__main__")]
    assert loaded_by(f"import {', '.join(names)}") & {"torch", "ray", "workers"} == set()


def test_planning_loads_only_what_it_uses() -> None:
    """It starts fast: a local plan over a column needs no S3 client, no templates and no data frames."""
    loaded = loaded_by("import pipeline.jobfile, pipeline.plan, pipeline.dataset, pipeline.ledger")
    assert loaded & {"torch", "ray", "workers", "s3fs", "botocore", "aiohttp", "jinja2", "pandas"} == set()


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_only_storage_opens_paths(file: Path) -> None:
    if file.stem == "storage":
        return
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    builtin = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "open"]
    modules = [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in OPENERS
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("os", "io", "pa", "Path", "path", "fsspec", "tempfile")
    ]
    assert builtin + modules == []
