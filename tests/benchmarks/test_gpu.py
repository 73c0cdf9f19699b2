"""Tests that the GPU benchmark runs on a CPU at the smallest size; its figures mean nothing there."""

import json
from pathlib import Path

import pytest
import torch

from model.network.random_weights import random_pair
from tests.benchmarks.gpu import __main__ as bench
from tests.benchmarks.gpu.random_model import SIZES
from tests.benchmarks.gpu.report import crossings
from tests.benchmarks.roofline import Hardware, Roofline

SMALL = "--size noise --device cpu --rows 1 --contexts 20 --throughput-rows 2 --steps 3 --prompt 8 --new 16"


@pytest.mark.slow
def test_it_measures_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report holds every figure once, its tables name the command, and two stages give the tokens of one stage."""
    arguments = [*SMALL.split(), "--stage-rows", "2", "--folder", str(tmp_path), "--out", str(tmp_path / "gpu.json")]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    bench.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(t["kind"], t["rows"]) for t in found["forwards"]] == [(kind, 1) for kind in ("denoise", "commit", "ar")]
    assert all(t["over_floor"] > 1 for t in found["forwards"])
    modes = ["ar", "diffusion, 3 steps", "lockstep, 3 steps"]
    assert [(rate["what"], rate["rows"]) for rate in found["throughput"]] == [(mode, 2) for mode in modes]
    assert all(rate["tokens_per_s"] > 0 for rate in found["throughput"])
    ours = [rate for rate in found["throughput"] if rate["what"] in modes[:2]]
    assert all(rate["host_ms"] > 0 and rate["planned"] > 2**20 and rate["peak"] is None for rate in ours)
    assert found["load"]["disk"].keys() == {"context tower", "denoiser"}
    stages = [one for one in found["stages"].values() if isinstance(one, dict)]
    assert [one["rows_that_differ"] for one in stages] == [0, 0, 0]
    assert found["left_out"] == []
    told = (tmp_path / "gpu.md").read_text()
    assert told.startswith("`python -m tests.benchmarks.gpu --size noise")
    assert told.count("| --- |") >= 4
    assert "<svg" in (tmp_path / "gpu.svg").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_where_diffusion_crosses_ar_is_told() -> None:
    rates = [
        {"what": what, "rows": rows, "tokens_per_s": per_s}
        for what, speeds in {
            "ar": (10, 20, 80),
            "fast": (20, 40, 100),
            "slow": (15, 24, 60),
            "lockstep": (1, 1, 1),
        }.items()
        for rows, per_s in zip((1, 2, 4), speeds, strict=True)
    ]
    assert crossings(rates) == {
        "fast": "faster than AR at all rows measured",
        "slow": "crosses AR between 2 and 4 rows",
    }


def test_a_large_model_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--size", "released", "--device", "cpu"])
    with pytest.raises(SystemExit, match="need a GPU"):
        bench.main()


@pytest.mark.slow
def test_random_weights_give_finite_logits_and_the_middle_size_is_a_billion() -> None:
    pair = random_pair(SIZES["noise"], torch.bfloat16, [torch.device("cpu")])
    assert pair.denoiser_logits([5, 6, 7], [3] * 4, 1.0).isfinite().all()
    assert Roofline(SIZES["mid"], Hardware()).parameters() == pytest.approx(0.5e9, rel=0.2)
