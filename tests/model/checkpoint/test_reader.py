"""Tests that complete checkpoints open from anywhere, and that each kind of broken one is refused in one line that
names the fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.checkpoint.reader import BUILTIN, Checkpoint, open_checkpoint
from model.errors import CheckpointError
from tests.model.golden_cases import CHECKPOINT

CONTEXT_SHARD, DENOISER_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the built-in checkpoint that the test may damage."""
    return Path(shutil.copytree(BUILTIN["noise"], tmp_path / "copy"))


def refused(folder: Path, towers: str = "both") -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder)).validate(towers)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def edit_shard(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # cloned, as the file stays mapped
    change(tensors)
    save_file(tensors, file)


# Checkpoints that open


@pytest.mark.parametrize("towers", ["both", "context"])
@pytest.mark.parametrize("uri", ["builtin:noise", str(CHECKPOINT)])
def test_complete_checkpoints_are_valid(uri: str, towers: Any) -> None:
    open_checkpoint(uri).validate(towers)


def test_tensors_are_read_as_the_safetensors_library_reads_them() -> None:
    checkpoint = open_checkpoint(str(CHECKPOINT))
    seen = 0
    for file in sorted(CHECKPOINT.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  not a dict
                info = checkpoint.tensors[name]
                assert (info.shard, info.dtype, list(info.shape)) == (
                    file.name,
                    "F32",
                    shard.get_slice(name).get_shape(),
                )
                assert torch.frombuffer(checkpoint.read(info), dtype=torch.float32).equal(
                    shard.get_tensor(name).ravel()
                )
                seen += 1
    assert seen == len(checkpoint.tensors) == 282


def test_one_shard_without_an_index(folder: Path) -> None:
    whole = load_file(folder / CONTEXT_SHARD) | load_file(folder / DENOISER_SHARD)
    save_file(whole, folder / "model.safetensors")
    for name in (INDEX, CONTEXT_SHARD, DENOISER_SHARD):
        (folder / name).unlink()
    checkpoint = open_checkpoint(str(folder))
    checkpoint.validate("both")
    checkpoint.validate("context")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "corrupt" in refused(folder)


def test_ar_mode_needs_no_denoiser_shards(folder: Path) -> None:
    (folder / DENOISER_SHARD).unlink()
    open_checkpoint(str(folder)).validate("context")
    assert "1 shard is missing: " + DENOISER_SHARD in refused(folder)


def test_any_fsspec_url(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/checkpoints/tiny", recursive=True)
    try:
        checkpoint = open_checkpoint("memory://checkpoints/tiny/")
        checkpoint.validate()
        here = open_checkpoint(str(folder))
        assert checkpoint.identity() == here.identity()
        name = "denoiser_tower.layers.0.mixer.in_proj.weight"
        assert checkpoint.read(checkpoint.tensors[name]) == here.read(here.tensors[name])
    finally:
        memory.rm("/checkpoints", recursive=True)


def test_a_remote_tensor_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.reader.PIECE", 1000)
    memory = fsspec.filesystem("memory")
    memory.put(str(BUILTIN["noise"]), "/pieces", recursive=True)
    try:
        checkpoint, whole = open_checkpoint("memory://pieces"), open_checkpoint("builtin:noise")
        info = checkpoint.tensors["lm_head.weight"]
        assert info.nbytes > 30_000
        assert checkpoint.read(info) == whole.read(info)
    finally:
        memory.rm("/pieces", recursive=True)


def test_the_tokenizer_is_optional(folder: Path) -> None:
    assert open_checkpoint(str(folder)).tokenizer_json() == (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    assert open_checkpoint(str(folder)).tokenizer_json() is None


# Identity


def test_a_copy_has_the_same_identity(folder: Path) -> None:
    copy = open_checkpoint(str(folder))
    assert copy.identity() == open_checkpoint("builtin:noise").identity()
    assert len(copy.identity()) == 64
    assert copy.identity() != open_checkpoint(str(CHECKPOINT)).identity()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", CONTEXT_SHARD, DENOISER_SHARD])
def test_any_changed_byte_of_a_small_checkpoint_changes_the_identity(folder: Path, name: str) -> None:
    before = open_checkpoint(str(folder)).identity()
    content = bytearray((folder / name).read_bytes())
    if name.endswith("json"):
        content += b" "
    else:
        content[-100_001] ^= 1
    (folder / name).write_bytes(content)
    assert open_checkpoint(str(folder)).identity() != before


def test_the_identity_of_a_large_shard_reads_samples_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.reader._WHOLE", 1000)
    monkeypatch.setattr("model.checkpoint.reader._SAMPLE", 100)
    before = open_checkpoint(str(folder)).identity()
    content = bytearray((folder / DENOISER_SHARD).read_bytes())
    content[-101] ^= 1  # just before the last sample
    (folder / DENOISER_SHARD).write_bytes(content)
    assert open_checkpoint(str(folder)).identity() == before
    content[-100] ^= 1
    (folder / DENOISER_SHARD).write_bytes(content)
    assert open_checkpoint(str(folder)).identity() != before


# Checkpoints that are refused


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("builtin:huge", "no built-in checkpoint 'huge': there are tiny, noise"),
        ("", "empty string"),
        ("/does/not/exist", r"config\.json is missing"),
        ("nope://bucket/folder", "Protocol not known: nope"),
        ("memory://nothing/here", r"config\.json is missing"),
    ],
)
def test_places_without_a_checkpoint(uri: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(uri)
    assert "\n" not in str(caught.value)


def test_a_file_system_whose_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(CheckpointError, match=r"hf://org/name: a package is missing for this URL.*huggingface_hub"):
        open_checkpoint("hf://org/name")


def test_any_storage_error_becomes_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeError(Exception):
        pass

    def fail(*_: object) -> None:
        raise StrangeError("503\nslow down")

    checkpoint = open_checkpoint(str(folder))
    monkeypatch.setattr("model.checkpoint.reader._Folder._read_piece", fail)
    with pytest.raises(CheckpointError, match=r"cannot read .*: StrangeError: 503 slow down"):
        checkpoint.read(checkpoint.tensors["lm_head.weight"])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_files_that_are_not_json(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert f"{name} is not JSON" in refused(folder)


def test_config_that_is_no_object_or_not_supported(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(mlp_hidden_act="gelu"))
    assert "mlp_hidden_act is 'gelu'" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json holds a JSON list" in refused(folder)


def test_no_shards_at_all(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert f"neither {INDEX} nor model.safetensors" in refused(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "", 7, None])
def test_an_index_that_leaves_the_folder(folder: Path, shard: object) -> None:
    edit_json(folder / INDEX, lambda raw: raw["weight_map"].update({"lm_head.weight": shard}))
    assert "lm_head.weight: this is not a file name" in refused(folder)


@pytest.mark.parametrize("document", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_weight_map(folder: Path, document: dict[str, object]) -> None:
    (folder / INDEX).write_text(json.dumps(document))
    assert "no weight_map" in refused(folder)


@pytest.mark.parametrize("towers", ["both", "context"])
def test_a_missing_shard(folder: Path, towers: str) -> None:
    (folder / CONTEXT_SHARD).unlink()
    assert "1 shard is missing: " + CONTEXT_SHARD in refused(folder, towers)


def test_an_index_that_names_a_missing_tensor(folder: Path) -> None:
    edit_shard(folder / DENOISER_SHARD, lambda tensors: tensors.pop("t_block.1.bias"))
    assert "1 tensor is missing: t_block.1.bias" in refused(folder)
    open_checkpoint(str(folder)).validate("context")


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_shard(folder / DENOISER_SHARD, lambda tensors: [tensors.pop(f"scale_shift_tables.{i}") for i in range(10)])
    assert "10 tensors are missing: scale_shift_tables.0, " in refused(folder)
    assert refused(folder).endswith(" and 7 more")


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    edit_shard(folder / CONTEXT_SHARD, lambda t: t.update({"context_tower.norm_f.weight": torch.ones(65)}))
    assert "1 tensor is of the wrong shape: context_tower.norm_f.weight is [65], config.json says [64]" in refused(
        folder
    )


@pytest.mark.parametrize("towers", ["both", "context"])
def test_a_tensor_that_the_model_does_not_know(folder: Path, towers: str) -> None:
    edit_shard(folder / CONTEXT_SHARD, lambda t: t.update({"context_tower.layers.0.mixer.extra": torch.ones(2)}))
    assert "1 tensor is unknown to this model: context_tower.layers.0.mixer.extra" in refused(folder, towers)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    twin = {"lm_head.weight": torch.zeros(260, 64)}
    edit_shard(folder / CONTEXT_SHARD, lambda tensors: tensors.update(twin))
    assert "1 tensor is stored twice: lm_head.weight" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_does_not_load(folder: Path, dtype: torch.dtype) -> None:
    edit_shard(folder / CONTEXT_SHARD, lambda t: t.update({"context_lm_head.weight": torch.ones(260, 64).to(dtype)}))
    assert "not stored as F64, F32, F16, BF16: context_lm_head.weight (" in refused(folder)


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def write_header(file: Path, header: object) -> None:
    content = file.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "0 bytes long"),
        (b"\x00" * 100, "header claims 0 bytes"),
        (b"\xff" * 100, "header claims 18446744073709551615 bytes in a file of 100"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "header claims"),
        ((4).to_bytes(8, "little") + b"\xff{}}", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header holds a JSON list"),
        ((11).to_bytes(8, "little") + b'{"a": null}', "entry for a is malformed"),
    ],
)
def test_a_shard_that_is_no_safetensors_file(folder: Path, content: bytes, problem: str) -> None:
    (folder / DENOISER_SHARD).write_bytes(content)
    assert f"1 shard is corrupt: {DENOISER_SHARD} (" in refused(folder)
    assert problem in refused(folder)
    open_checkpoint(str(folder)).validate("context")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_cut_short_or_too_long(folder: Path, change: int) -> None:
    content = (folder / CONTEXT_SHARD).read_bytes()
    (folder / CONTEXT_SHARD).write_bytes((content + b"\0")[: len(content) + change])
    assert f"its header describes {len(content)} bytes, the file has {len(content) + change}" in refused(folder)


def test_tensors_that_overlap_or_disagree_with_their_shape(folder: Path) -> None:
    file = folder / CONTEXT_SHARD
    header = header_of(file)
    entries = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[entries[1]]["data_offsets"][0] -= 2
    write_header(file, header)
    assert f"{entries[1]} begins at byte" in refused(folder)
    header[entries[1]]["data_offsets"][0] += 2
    header[entries[1]]["shape"] = [1, *header[entries[1]]["shape"], 2]
    write_header(file, header)
    assert f"{entries[1]} has " in refused(folder)


@pytest.mark.parametrize("offsets", [[0], [0, "9"], [-4, 0], [0.0, 4.0], None])
def test_malformed_offsets(folder: Path, offsets: object) -> None:
    header = header_of(folder / CONTEXT_SHARD)
    header["context_lm_head.weight"]["data_offsets"] = offsets
    write_header(folder / CONTEXT_SHARD, header)
    assert "entry for context_lm_head.weight is malformed" in refused(folder)


def test_opening_needs_no_torch() -> None:
    assert Checkpoint.__module__ == "model.checkpoint.reader"
    import subprocess
    import sys

    code = (
        "import sys, model.checkpoint.tokenizer; from model.checkpoint.reader import open_checkpoint; "
        "open_checkpoint('builtin:noise').validate(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
