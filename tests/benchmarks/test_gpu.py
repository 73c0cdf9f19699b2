"""The GPU benchmark runs, here on a CPU at the smallest size: its figures mean nothing there."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu import __main__ as bench
from tests.benchmarks.gpu.random_model import SIZES, random_pair
from tests.benchmarks.roofline import Hardware, Roofline


def test_it_measures_forwards_and_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "--size noise --device cpu --rows 1,2 --contexts 20 --throughput-rows 2 --steps 3 --prompt 8 --new 16"
    monkeypatch.setattr("sys.argv", ["bench", *small.split(), "--out", str(tmp_path / "gpu.json")])
    bench.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(t["kind"], t["rows"]) for t in found["forwards"]] == [
        (kind, rows) for rows in (1, 2) for kind in ("denoise", "commit", "ar")
    ]
    assert all(t["over_floor"] > 1 for t in found["forwards"])
    assert [rate["what"] for rate in found["throughput"]] == ["ar", "diffusion, 3 steps", "lockstep, 3 steps"]
    assert all(rate["tokens_per_s"] > 0 for rate in found["throughput"])


def test_a_large_model_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--size", "released", "--device", "cpu"])
    with pytest.raises(SystemExit, match="need a GPU"):
        bench.main()


def test_random_weights_give_finite_logits_and_the_middle_size_is_a_billion() -> None:
    pair = random_pair(SIZES["noise"], torch.bfloat16, torch.device("cpu"))
    assert pair.denoiser_logits([5, 6, 7], [3] * 4, 1.0).isfinite().all()
    assert Roofline(SIZES["mid"], Hardware()).parameters() == pytest.approx(0.5e9, rel=0.2)
