"""Tests of the checks of `doctor` that need torch, and of the command itself."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import model.checkpoint.loader
import model.checkpoint.released
import model.checks.kernels
import workers.checks.kernels
from model.builtin.noise import CONFIG
from model.checkpoint.config import TwoTowerConfig
from model.checks.kernels import KernelError
from model.errors import RequestError
from pipeline.checks.findings import Finding
from pipeline.cli.app import app
from pipeline.config.job import Job
from workers.checks.devices import check_gpus, check_plan
from workers.checks.kernels import check_kernels

JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
workers: {{gpus: 0}}
"""


def job_for(gpus: int) -> Job:
    """Return a job whose replicas have this number of GPUs."""
    sections = {"input": {"path": "in"}, "output": {"path": "out"}, "model": {"checkpoint": "builtin:noise"}}
    return Job.model_validate({**sections, "workers": {"gpus": gpus}})


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_the_command_looks_at_the_machine_and_at_the_job(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in" / "a.parquet")
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "job.yaml"), "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"]) == (0, True), told
    names = {line["check"] for line in told["checks"]}
    assert {"python", "torch", "memory", "gpus", "kernels", "plan", "ray", "job", "input", "checkpoint"} <= names
    [plan] = [line["found"] for line in told["checks"] if line["check"] == "plan"]
    assert "max_rows 16, kv_tokens 131,072" in plan
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("address", "level"), [(None, "FAIL"), ("head:6379", "warn")])
def test_a_job_for_more_gpus_than_are_here_fails_unless_a_cluster_may_have_them(
    monkeypatch: pytest.MonkeyPatch, address: str | None, level: str
) -> None:
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    [found] = check_plan(job_for(100))
    assert found.level == level
    assert "a replica asks for 100 GPUs" in found.found


def test_a_wrong_kernel_fails_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_pair: object) -> None:
        raise KernelError("kernel attend of PlainKernels is wrong on cpu")

    monkeypatch.setattr(model.checks.kernels, "check_kernels", wrong)
    first, *_ = check_kernels()
    assert first == Finding("FAIL", "cpu: kernel attend of PlainKernels is wrong on cpu")


def test_layers_of_the_released_sizes_are_checked_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers on the CPU are declared to be those of the released sizes. Random weights pass the check of the
    kernels."""
    monkeypatch.setattr(model.checkpoint.released, "RELEASED_CONFIG", TwoTowerConfig.from_dict(dict(CONFIG)))
    pair = workers.checks.kernels._released_layers("cpu")
    assert [layer.kind for layer in pair.context.layers] == ["mamba", "attention", "moe"]
    assert pair.denoiser is None
    model.checks.kernels.check_kernels(pair)
    monkeypatch.setattr(model.checkpoint.loader, "free_memory", lambda _device: 1 << 30)
    with pytest.raises(RequestError, match=r"1\.0 GiB are free, too few for a layer of each kind .* \(4 GiB\): stop"):
        workers.checks.kernels._released_layers("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_of_this_gpu_are_right_at_the_released_sizes() -> None:
    [line] = [line for line in check_kernels() if line.found.startswith("cuda:0: ")]
    assert line.level == "ok", line
    assert "s for released sizes" in line.found


@pytest.mark.parametrize(
    ("capability", "free", "level", "text"),
    [
        ((9, 0), 79 << 30, "ok", "cuda:0 H100, 79.0 of 80.0 GiB free, compute capability 9.0, driver"),
        ((9, 0), 30 << 30, "warn", "other processes hold the rest"),
        ((7, 5), 79 << 30, "warn", "no bfloat16"),
    ],
)
def test_a_gpu_is_told_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int, level: str, text: str
) -> None:
    """The answers of torch are faked."""
    properties = SimpleNamespace(name="H100", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (free, 80 << 30))
    [found] = check_gpus(None)
    assert found.level == level
    assert text in found.found
