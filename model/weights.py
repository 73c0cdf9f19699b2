"""From a checkpoint into tensors that already exist, without a second copy of the weights in memory.

check_memory(checkpoint, "both", torch.bfloat16, ["cuda:0", "cuda:1"])     # before anything is allocated
load_tensors(checkpoint, {"lm_head.weight": head, "…experts.3.up_proj.weight": stacked[3], …})
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from model.checkpoint import PIECE, Checkpoint, TensorInfo
from model.config import Towers, expected_tensors
from model.errors import CheckpointError

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_READERS = 8  # range reads under way at once
_ALIGN = 64  # bytes; where tensors begin in the buffer


def weight_bytes(checkpoint: Checkpoint, towers: Towers, dtype: torch.dtype) -> int:
    """Bytes that the weights of `towers` take in memory, all of them in `dtype`."""
    shapes = expected_tensors(checkpoint.config, towers).values()
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def check_memory(
    checkpoint: Checkpoint,
    towers: Towers,
    dtype: torch.dtype,
    devices: Sequence[str | torch.device],
    stage_bytes: Sequence[int] | None = None,
) -> None:
    """Raises CheckpointError where the weights do not fit into the memory that is free now.

    `devices` holds one name a stage; a device named twice must hold both stages. `stage_bytes` are the bytes that each
    stage takes; without them the weights are shared equally. The host must also hold the largest tensor on its way.
    """
    if stage_bytes is None:
        stage_bytes = [-(-weight_bytes(checkpoint, towers, dtype) // len(devices))] * len(devices)
    if len(stage_bytes) != len(devices):
        raise ValueError(f"{len(stage_bytes)} stage_bytes for {len(devices)} devices")
    largest = max(checkpoint.tensors[name].nbytes for name in expected_tensors(checkpoint.config, towers))
    needs = {"cpu": largest}  # device name -> bytes of all its stages
    for device, need in zip(devices, stage_bytes, strict=True):
        name = "cuda:0" if str(device) == "cuda" else str(device)
        needs[name] = needs.get(name, 0) + need
    for device, need in needs.items():
        free = free_memory(device)
        if need > free:
            raise CheckpointError(
                f"checkpoint {checkpoint.uri} needs {_gib(need)} in {str(dtype).removeprefix('torch.')} on {device}, "
                f"{_gib(free)} are free: use more devices or a machine with more memory, a smaller dtype, "
                "or stop what else runs there"
            )


def free_memory(device: str | torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU also within the limit of the control group."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if kind != "cpu":
        raise CheckpointError(f"device {device!r} is not supported: use cpu or cuda:N")
    free = _available_ram()
    limit = _cgroup_free(Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, limit)


def _available_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )  # no /proc: macOS, where all of it is the best guess


def _cgroup_free(root: Path) -> int | None:
    """Bytes left of the memory limit of this container (cgroup v2 or v1); None without a limit.

    File pages that the kernel would drop first count as free, as they do in MemAvailable.
    """
    for limit_file, usage_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            limit = (root / limit_file).read_text().strip()
            usage = int((root / usage_file).read_text())
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if not limit.isdigit():  # "max"
            return None
        return max(0, int(limit) - usage + int(stat.get(cache_key, 0)))
    return None


def load_tensors(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> None:
    """Fills `targets`, checkpoint name -> destination: any device, any float dtype, contiguous or a view.

    Tensors pass through one buffer of the size of the largest: as many as fit are read at once, in pieces and by
    several threads, in the order in which they lie in the shards. That buffer is all the memory taken beyond the
    destinations (from remote storage, the pieces under way come on top: at most 64 MiB). Values are rounded to the
    destination's dtype once.
    Raises CheckpointError where a tensor is absent, has another shape or dtype, or its shard ends too early.
    """
    infos = {name: _info(checkpoint, name, target) for name, target in targets.items()}
    wanted = sorted(
        ((name, info) for name, info in infos.items() if info.nbytes), key=lambda item: (item[1].shard, item[1].start)
    )
    # One buffer for all: buffers that come and go in many threads leave several times their size to the allocator.
    buffer = bytearray(max((info.nbytes for _, info in wanted), default=0))
    with ThreadPoolExecutor(_READERS) as threads, torch.no_grad():
        for group in _groups(wanted, len(buffer)):
            reads = [_submit(threads, checkpoint, info, memoryview(buffer)[at:]) for _, info, at in group]
            for (name, info, at), pieces in zip(group, reads, strict=True):
                try:
                    _ = [piece.result() for piece in pieces]
                except CheckpointError as error:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise CheckpointError(f"tensor {name} cannot be loaded: {error}") from error
                stored = STORED_DTYPES[info.dtype]
                count = info.nbytes // stored.itemsize
                targets[name].copy_(torch.frombuffer(buffer, dtype=stored, count=count, offset=at).view(info.shape))


def _submit(
    threads: ThreadPoolExecutor, checkpoint: Checkpoint, info: TensorInfo, buffer: memoryview
) -> "list[Future[None]]":
    return [
        threads.submit(checkpoint.read_into, info, start, buffer[start : min(start + PIECE, info.nbytes)])
        for start in range(0, info.nbytes, PIECE)
    ]


def _info(checkpoint: Checkpoint, name: str, target: torch.Tensor) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"checkpoint {checkpoint.uri}: tensor {name} is missing")
    if info.dtype not in STORED_DTYPES:
        raise CheckpointError(f"checkpoint {checkpoint.uri}: tensor {name} is stored as {info.dtype}, not as a float")
    if info.shape != tuple(target.shape):
        raise CheckpointError(
            f"checkpoint {checkpoint.uri}: tensor {name} is {list(info.shape)} in {info.shard}, "
            f"{list(target.shape)} is due"
        )
    return info


def _groups(wanted: Sequence[tuple[str, TensorInfo]], size: int) -> Iterator[list[tuple[str, TensorInfo, int]]]:
    """Cuts `wanted` into runs that fit into `size` bytes together; adds where in the buffer each tensor goes."""
    group, used = list[tuple[str, TensorInfo, int]](), 0
    for name, info in wanted:
        at = -(-used // _ALIGN) * _ALIGN
        if group and at + info.nbytes > size:
            yield group
            group, at = [], 0
        group.append((name, info, at))
        used = at + info.nbytes
    if group:
        yield group


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
