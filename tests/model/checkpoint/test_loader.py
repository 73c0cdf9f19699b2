"""Tests that weights are loaded whole and rounded once, into memory that already exists, or not at all."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model import load_model
from model.builtin.noise import CONFIG
from model.checkpoint import loader
from model.checkpoint.config import TwoTowerConfig, expected_tensors
from model.checkpoint.loader import Loaded, check_memory, free_memory, load_tensors, load_towers, weight_bytes
from model.checkpoint.reader import BUILTIN, Checkpoint, TensorInfo, open_checkpoint
from model.checkpoint.staging import HostCopies
from model.errors import CheckpointError
from tests import memory
from tests.model.golden_cases import CHECKPOINT

GIB = 2**30
ROOT = Path(__file__).parents[3]


def golden_tensors() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in CHECKPOINT.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_tensor_arrives_in_the_wanted_dtype(dtype: torch.dtype) -> None:
    stored = golden_tensors()
    targets = {name: torch.empty(tensor.shape, dtype=dtype) for name, tensor in stored.items()}
    load_tensors(open_checkpoint(str(CHECKPOINT)), targets)
    assert all(targets[name].equal(tensor.to(dtype)) for name, tensor in stored.items())


def test_targets_may_be_parts_of_stacked_experts() -> None:
    checkpoint = open_checkpoint("builtin:noise")
    config = checkpoint.config
    stacked = torch.full((config.n_routed_experts, config.moe_intermediate_size, config.hidden_size), math.nan)
    name = "context_tower.layers.1.mixer.experts.{}.up_proj.weight".format
    load_tensors(checkpoint, {name(i): stacked[i] for i in range(config.n_routed_experts)})
    single = torch.empty(config.moe_intermediate_size, config.hidden_size)
    load_tensors(checkpoint, {name(5): single})
    assert stacked.isfinite().all()
    assert stacked[5].equal(single)
    with pytest.raises(ValueError, match="not contiguous"):
        load_tensors(checkpoint, {name(5): torch.empty(single.T.shape).T})


def test_nothing_asked_nothing_read() -> None:
    load_tensors(open_checkpoint("builtin:noise"), {})


def test_other_shapes_and_unknown_names_are_refused() -> None:
    checkpoint = open_checkpoint("builtin:noise")
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[260, 64\] in model-00002.*must be \[64, 260\]"):
        load_tensors(checkpoint, {"lm_head.weight": torch.empty(64, 260)})
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        load_tensors(checkpoint, {"nothing": torch.empty(1)})


def test_a_shard_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN["noise"], tmp_path, dirs_exist_ok=True)
    checkpoint = open_checkpoint(str(tmp_path))
    last = max(checkpoint.tensors, key=lambda name: (checkpoint.tensors[name].shard, checkpoint.tensors[name].end))
    info = checkpoint.tensors[last]
    with (tmp_path / info.shard).open("r+b") as file:
        file.truncate(info.end - 1)
    with pytest.raises(CheckpointError, match=f"tensor {last} cannot be loaded: .*{info.shard} ends early"):
        load_tensors(checkpoint, {last: torch.empty(info.shape)})


class Shard:
    """A stand-in for a Checkpoint: BF16 tensors t0, t1, … of these sizes, with gaps between them, in one shard."""

    uri = "shard"

    def __init__(self, sizes: Sequence[int]) -> None:
        self.stored = [bytes((i + j) % 251 for j in range(2 * size)) for i, size in enumerate(sizes)]
        self.tensors = {
            f"t{i}": TensorInfo("shard", "BF16", (size,), 1000 * i, 1000 * i + 2 * size) for i, size in enumerate(sizes)
        }

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.stored[info.start // 1000][offset : offset + len(buffer)]

    def load(self) -> list[bytes]:
        """Return the bytes of the tensors, loaded by load_tensors in the order from last to first."""
        targets = {n: torch.ones(info.shape, dtype=torch.bfloat16) for n, info in reversed(self.tensors.items())}
        assert load_tensors(self, targets) == sum(map(len, self.stored))  # type: ignore[arg-type]
        return [bytes(targets[name].view(torch.uint8).tolist()) for name in self.tensors]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 7, 32, 40, 64, 65, 200, 450]), max_size=14),
    piece=st.sampled_from([7, 64, 10_000_000]),
    size=st.sampled_from([64, 192, 4096]),
    count=st.integers(2, 4),
)
def test_tensors_of_any_size_pass_through_buffers_of_any_size(
    sizes: list[int], piece: int, size: int, count: int
) -> None:
    """Tensors arrive whole, even if one lies across several buffers and copies happen as late as they may."""
    copies = LateCopies()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "PIECE", piece)
        patch.setattr(loader, "BUFFER", size)
        patch.setattr(loader, "BUFFERS", count)
        patch.setattr(loader, "copies_to", lambda _devices: copies)
        shard = Shard(sizes)
        assert shard.load() == shard.stored
    assert copies.taken <= count * size


class LateCopies(HostCopies):
    """A stand-in for a stream: a copy happens only when it is waited for. By then its buffer may have been filled
    again."""

    def __init__(self) -> None:
        self.taken = self._done = 0
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []

    def buffer(self, size: int) -> torch.Tensor:
        self.taken += size
        return super().buffer(size)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._begun.append((target, source))

    def mark(self) -> Callable[[], object]:
        begun = len(self._begun)

        def wait() -> None:
            for target, source in self._begun[self._done : begun]:
                target.copy_(source)
            self._done = max(self._done, begun)

        return wait


@pytest.mark.slow
def test_the_towers_are_loaded_in_turn_and_each_is_timed() -> None:
    """Every weight of a model with two stages is read once, those of the context tower before those of the denoiser
    tower."""
    pair = load_model("builtin:noise", devices=["cpu", "cpu"])
    checkpoint = open_checkpoint("builtin:noise")
    read: list[str] = []

    class Reading:
        uri, config, tensors = checkpoint.uri, checkpoint.config, checkpoint.tensors

        def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
            read.extend(name for name, other in self.tensors.items() if other is info)
            checkpoint.read_into(info, offset, buffer)

    context, denoiser = load_towers(Reading(), pair.checkpoint_targets())  # type: ignore[arg-type]
    of_context = expected_tensors(checkpoint.config, "context").keys()
    assert sorted(read) == sorted(checkpoint.tensors)
    assert [name in of_context for name in read] == sorted((name in of_context for name in read), reverse=True)
    assert context.bytes + denoiser.bytes == sum(info.nbytes for info in checkpoint.tensors.values())
    assert str(Loaded("context tower", 63_160_000_000, 15.84)) == "context tower 63.2 GB in 15.8 s (4.0 GB/s)"
    assert str(Loaded("denoiser", 53_400_000, 0.5)) == "denoiser 53.4 MB in 0.5 s (106.8 MB/s)"
    (alone,) = load_towers(checkpoint, load_model("builtin:noise", towers="context").checkpoint_targets())
    assert (alone.what, alone.bytes) == ("context tower", context.bytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_reach_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Weights pass through small pinned buffers, which are used again while copies from them are in progress."""
    monkeypatch.setattr(loader, "BUFFER", 4096)
    checkpoint = open_checkpoint("builtin:noise")
    on = {
        device: {n: torch.empty(info.shape, dtype=dtype, device=device) for n, info in checkpoint.tensors.items()}
        for device in ("cpu", "cuda")
    }
    for targets in on.values():
        load_tensors(checkpoint, targets)
    assert all(on["cuda"][name].cpu().equal(right) for name, right in on["cpu"].items())


# Memory


def released() -> Checkpoint:
    """Return a checkpoint of the released size, of which only the config exists."""
    checkpoint = object.__new__(Checkpoint)
    checkpoint.uri = "s3://models/two-tower"
    checkpoint.config = TwoTowerConfig.from_dict(
        dict(CONFIG)
        | {
            "hidden_size": 2688,
            "vocab_size": 131072,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_hidden_layers": 52,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "num_attention_heads": 32,
            "head_dim": 128,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
        }
    )
    shapes = expected_tensors(checkpoint.config)
    checkpoint.tensors = {n: TensorInfo("shard", "BF16", s, 0, 2 * torch.Size(s).numel()) for n, s in shapes.items()}
    return checkpoint


def test_not_enough_memory_is_said_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_memory", lambda _: int(21.3 * GIB))
    message = r"s3://models/two-tower needs 117\.\d GiB in bfloat16 on cpu, only 21\.3 GiB are free: "
    with pytest.raises(CheckpointError, match=message):
        check_memory(released(), "both", torch.bfloat16, ["cpu"])
    assert weight_bytes(released(), "context", torch.bfloat16) / GIB == pytest.approx(58.8, abs=0.1)
    check_memory(open_checkpoint("builtin:noise"), "both", torch.float32, ["cpu"])


@pytest.mark.slow
def test_stages_are_counted_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 80 * GIB, "cuda:1": 60 * GIB, "cpu": GIB}
    monkeypatch.setattr(loader, "free_memory", lambda device: free[str(device)])
    check_memory(released(), "both", torch.bfloat16, ["cuda:0", "cuda:1"])
    with pytest.raises(CheckpointError, match=r"117\.\d GiB in bfloat16 on cuda:0, only 80\.0 GiB"):
        check_memory(released(), "both", torch.bfloat16, ["cuda:0", "cuda:0"])
    with pytest.raises(CheckpointError, match=r"61\.0 GiB in bfloat16 on cuda:1, only 60\.0 GiB"):
        check_memory(released(), "both", torch.bfloat16, ["cuda:0", "cuda:1"], [57 * GIB, 61 * GIB])
    free["cpu"] = 10 * 2**20
    with pytest.raises(CheckpointError, match=r"0\.1 GiB in bfloat16 on cpu, only 0\.0 GiB are free"):
        check_memory(released(), "both", torch.bfloat16, ["cuda:0", "cuda:1"])
    with pytest.raises(ValueError, match="1 stage_bytes for 2 devices"):
        check_memory(released(), "both", torch.bfloat16, ["cpu", "cpu"], [1])


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 50"}, 350),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "anon 5"}, None),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "total_inactive_file 10",
            },
            610,
        ),
        ({}, None),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert loader._cgroup_free(tmp_path) == free


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_memory("cpu") < 2**50
    with pytest.raises(CheckpointError, match="'meta' is not supported"):
        free_memory("meta")


MEASURE = """
import sys
import torch
from model.checkpoint import loader
from model.checkpoint.config import expected_tensors
from model.checkpoint.reader import open_checkpoint

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
checkpoint = open_checkpoint(sys.argv[1])
checkpoint.validate()
shapes = expected_tensors(checkpoint.config)
dtypes = torch.bfloat16, torch.float32
both = [{name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()} for dtype in dtypes]
loader.BUFFER = 2 * 2**20
before = resident("VmRSS")
for targets in both:
    loader.load_tensors(checkpoint, targets)
# Not getrusage: its ru_maxrss outlives exec(), so it would tell the size of the process that started this one.
print(resident("VmHWM") - before, sum(t.nbytes for targets in both for t in targets.values()))
"""


def write_large_checkpoint(folder: Path) -> None:
    """Write a checkpoint of 240 MiB of ones without holding it in memory. As in the released one, the heads are the
    largest tensors, and there are many experts."""
    raw = dict(CONFIG) | {
        "hidden_size": 1024,
        "vocab_size": 12288,
        "hybrid_override_pattern": "M*EE",
        "num_hidden_layers": 4,
        "n_routed_experts": 32,
        "moe_intermediate_size": 256,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for name, shape in expected_tensors(TwoTowerConfig.from_dict(raw)).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for _ in range(end // 2**20):
            file.write(b"\x80\x3f" * 2**19)
        file.write(b"\x80\x3f" * (end % 2**20 // 2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_weights_and_its_buffers_alone(tmp_path: Path) -> None:
    """Loading needs only the weights and 16 MiB of buffers, less than the largest tensor of 24 MiB, whether the weights
    are loaded as stored or converted.

    The limit leaves room for the readers' stacks and for what the allocator keeps, but not for a second copy of the
    largest tensor.
    """
    write_large_checkpoint(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=memory.environment(), check=True, capture_output=True, text=True)
    grown, total = (int(word) for word in done.stdout.split())
    assert total > 600 * 2**20
    more = (grown - total) / 2**20
    assert more <= 28, f"{more:.1f} MiB beyond the weights"
