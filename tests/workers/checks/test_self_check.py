"""Tests of the self-check of a replica at its start, and of the command that makes canary.json."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import model.network.tower
from model.checkpoint.reader import BUILTIN, open_checkpoint
from model.errors import TwoTowerError
from model.kernels.plain import PlainKernels
from model.kernels.protocol import ScanInputs
from model.network.two_tower import load_model
from pipeline.checks.canary_file import CanaryFile
from pipeline.cli.app import app
from pipeline.core.errors import JobFailed
from tests.workers.fakes import run_locally
from tests.workers.jobs import SmallJob, open_job, prompts_of
from workers.checks.canary import make_canary
from workers.checks.self_check import self_check
from workers.replica.build import make_runner
from workers.replica.local_pool import LocalPool

pytestmark = pytest.mark.slow

PROMPT = "1, 2, 3, 4, "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a copy of builtin:noise with a canary of one prompt."""
    folder = tmp_path_factory.mktemp("model") / "noise"
    shutil.copytree(BUILTIN["noise"], folder)
    before = open_checkpoint(str(folder)).identity()
    make_canary(str(folder), prompts=[PROMPT], tokens=18, dtype="float32", gpus=0, out=None, force=False)
    assert open_checkpoint(str(folder)).identity() == before, "jobs begun before could not be resumed"
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "noise"))


def check(checkpoint: Path | str, harm: Callable[[Any], object] = id, **arguments: Any) -> str:
    pair = load_model(str(checkpoint), **arguments)
    harm(pair)
    assert pair.tokenizer is not None
    return self_check(pair, pair.tokenizer, str(checkpoint))


def refusal(checkpoint: Path | str, harm: Callable[[Any], object] = id) -> str:
    with pytest.raises(TwoTowerError) as raised:
        check(checkpoint, harm)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def shuffle_head(pair: Any) -> None:
    weight = pair.context.head.weight.data
    weight.copy_(weight.flip(0))


def test_a_checkpoint_that_is_well_passes(checkpoint: Path) -> None:
    cases: list[dict[str, Any]] = [{}, {"dtype": "bfloat16", "towers": "context"}]
    for arguments in cases:
        text = check(checkpoint, **arguments)
        assert text.startswith("self-check passed in ")
        assert text.endswith(" s: kernels are correct, 1 prompt of canary.json as expected")
    assert check("builtin:noise").endswith("logits are finite (no canary.json to compare completions with)")


def test_wrong_weights_are_refused_with_what_to_do(checkpoint: Path) -> None:
    text = refusal(checkpoint, shuffle_head)
    assert text.startswith(f"checkpoint {checkpoint} is not what {checkpoint}/canary.json expects: in ar mode ")
    assert "its files look like those that canary.json was made from: copy the weights again" in text


def test_other_files_are_named_by_their_identity(checkpoint: Path) -> None:
    """The bytes of the head are in another order, so the identity of the files is not the one in canary.json."""
    file = checkpoint / "model-00001-of-00002.safetensors"
    info = open_checkpoint(str(checkpoint)).tensors["context_lm_head.weight"]
    data = bytearray(file.read_bytes())
    data[info.start : info.end] = data[info.start : info.end][::-1]
    file.write_bytes(data)
    made_from = json.loads((checkpoint / "canary.json").read_text())["checkpoint"]
    identity = open_checkpoint(str(checkpoint)).identity()
    text = refusal(checkpoint)
    assert (
        f"was made from other files (identity {made_from[:12]}, here {identity[:12]}): copy the weights again" in text
    )
    assert text.endswith(f"else make it again (twotower canary {checkpoint} --force) or delete it")


def change(field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda canary: {**canary, field: value}


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda _: b"{", "is not JSON: "),
        (lambda _: b"\xff\xfe", "is not JSON: "),
        (lambda _: [], "has format None, this version reads 1; "),
        (change("format", 2), "has format 2, this version reads 1; "),
        (change("format", True), "has format True, this version reads 1; "),
        (change("more", 1), "cannot be read: more: Extra inputs are not permitted; "),
        (change("dtype", "int4"), "cannot be read: dtype: "),
        (change("prompts", []), "cannot be read: prompts: "),
        (lambda c: {**c, "cases": [{**c["cases"][0], "scores": [1.0]}]}, "scores and stable do not fit token_ids; "),
        (lambda c: {**c, "cases": [{**c["cases"][1], "fed": []}]}, "fed does not fit token_ids and block_size; "),
        (lambda c: {**c, "cases": [{**c["cases"][0], "prompt": 7}]}, "a case has prompt 7, the last one is 0; "),
        (change("settings", {"block_size": 16}), "was made with other settings, {'block_size': 16}; "),
        (
            lambda c: {**c, "prompts": [{"text": "a", "ids": [100, 70_000]}]},
            "holds token id 70000, the checkpoint's voc",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(checkpoint: Path, broken: Callable[[Any], Any], fault: str) -> None:
    file = checkpoint / "canary.json"
    content = broken(json.loads(file.read_text()))
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    text = refusal(checkpoint)
    assert text.startswith(f"{file} ")
    assert fault in text
    assert text.endswith(f"make it again (twotower canary {checkpoint} --force) or delete it")


def test_another_tokenizer_is_refused(checkpoint: Path) -> None:
    """The model would take its tokens for other words, and nothing else would notice."""
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(tokenizer))
    text = refusal(checkpoint)
    assert text.startswith(f"checkpoint {checkpoint}: its tokenizer.json gives other tokens for '{PROMPT}' than ")


def test_without_a_canary_logits_must_be_finite() -> None:
    def harm(pair: Any) -> None:
        pair.denoiser.layers[0].mixer.out_proj.weight.data[0, 0] = torch.nan

    text = refusal("builtin:noise", harm)
    assert text.startswith(
        "checkpoint builtin:noise failed the self-check: the model's logits were not finite after 0 "
    )


class IgnoresSeeds(PlainKernels):
    def mamba_scan(self, inputs: ScanInputs) -> torch.Tensor:
        rows = replace(inputs.rows, seeds=(-1,) * len(inputs.rows.seeds), _made={})
        return super().mamba_scan(replace(inputs, rows=rows))


def job_of(folder: Path, checkpoint: Path | str) -> SmallJob:
    return open_job(folder, prompts_of(3), model={"checkpoint": str(checkpoint), "dtype": "float32"})


def test_a_replica_with_wrong_kernels_does_not_start_and_the_job_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so in one line, with the kernel, the device, the dtype and the size of the error."""
    small = job_of(tmp_path, "builtin:noise")
    monkeypatch.setattr(model.network.tower, "kernels_for", lambda _device: IgnoresSeeds())
    with pytest.raises(JobFailed) as raised:
        run_locally(small, LocalPool(lambda replica: make_runner(small.spec, replica)))
    start = "no replica could start: kernel mamba_scan of IgnoresSeeds is wrong on cpu in float32 (context tower): "
    assert str(raised.value).startswith(start)
    assert " of the largest, 2e-05 is allowed; nothing was generated" in str(raised.value)
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_replica_says_what_it_checked_and_generates_as_without(checkpoint: Path, tmp_path: Path) -> None:
    """The canary's rows leave nothing behind in the engine, neither in its counts nor in its cache."""
    runner = make_runner(job_of(tmp_path / "a", checkpoint).spec, "r0")
    engine: Any = runner._engine
    assert runner.notes()[1].startswith("self-check passed in ")
    runner.close()
    engine.check()
    assert (engine.stats.prefill_tokens, engine.active, engine.waiting) == (0, 0, 0)
    assert engine.cache.allocator.free_slots == engine.cache.allocator.slots


def test_the_command_writes_once_and_replaces_by_force_alone(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUILTIN["noise"], tmp_path / "noise"))
    arguments = ["canary", str(folder), "--prompt", "one", "--prompt", "two\n2", "--tokens", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines[:4]] == [
        "'one' ar",
        r"'two\n2' ar",
        "'one' diffusion",
        r"'two\n2' diffusion",
    ]
    assert lines[4:] == [f"wrote {folder}/canary.json: 2 prompts, 4 completions in float32 on cpu"]
    first = (folder / "canary.json").read_bytes()
    assert CanaryFile.model_validate_json(first).checkpoint == open_checkpoint(str(folder)).identity()
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, again.stderr) == (
        1,
        f"error: {folder}/canary.json exists already: --force replaces it\n",
    )
    other = CliRunner().invoke(app, [*arguments, "--force", "--dtype", "bfloat16"])
    assert other.exit_code == 0, other.output
    assert b'"dtype": "bfloat16"' in (folder / "canary.json").read_bytes()


def test_the_command_writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store may be read-only, so canary.json can be written elsewhere; a bare name is in the current folder. If the
    checkpoint lacks the denoiser tower, only AR is compared."""
    folder = Path(shutil.copytree(BUILTIN["noise"], tmp_path / "noise"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["canary", str(folder), "--tokens", "2", "--prompt", "one", "--out", "mine.json"])
    assert done.exit_code == 0, done.output
    assert not (folder / "canary.json").exists()
    (tmp_path / "mine.json").rename(folder / "canary.json")
    assert check(folder, towers="context").endswith("1 prompt of canary.json as expected")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["builtin:none"], "error: no built-in checkpoint 'none': there are "),
        (["builtin:noise", "--prompt", ""], "error: prompt '' has no tokens; leave it out"),
        (["builtin:noise", "--prompt", "\udcff"], "error: a prompt holds characters that are not Unicode text"),
        (["builtin:noise", "--tokens", "9000"], "error: request '0': 24 prompt tokens and max_new_tokens 9000 exceed"),
        (["builtin:noise", "--dtype", "int8"], "error: dtype is 'int8': it must be one of float32, bfloat16"),
        (["builtin:noise", "--gpus", "64"], "error: device is 'cuda:0': this machine has "),
    ],
)
def test_the_command_refuses_what_cannot_be(arguments: list[str], error: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["canary", *arguments, "--out", str(tmp_path / "c.json")])
    assert (done.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert done.stderr.startswith(error), done.stderr
    assert done.stderr.count("\n") == 1
