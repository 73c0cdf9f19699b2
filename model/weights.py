"""From a checkpoint into tensors that already exist, without a second copy of the weights in memory.

check_memory(checkpoint, "both", torch.bfloat16, ["cuda:0", "cuda:1"])     # before anything is allocated
load_tensors(checkpoint, {"lm_head.weight": head, "…experts.3.up_proj.weight": stacked[3], …})
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from model.checkpoint import Checkpoint, TensorInfo
from model.config import Towers, expected_tensors
from model.errors import CheckpointError

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_READERS = 8
"""Range reads under way at once, as long as their tensors together are no larger than the largest one."""


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
    stage takes; without them the weights are shared equally. Room for one tensor on its way is asked from the host.
    """
    if stage_bytes is None:
        stage_bytes = [-(-weight_bytes(checkpoint, towers, dtype) // len(devices))] * len(devices)
    if len(stage_bytes) != len(devices):
        raise ValueError(f"{len(stage_bytes)} stage_bytes for {len(devices)} devices")
    needs: dict[str, int] = {}  # device name -> bytes of all its stages
    for device, need in zip(devices, stage_bytes, strict=True):
        needs[str(device)] = needs.get(str(device), 0) + need
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

    Tensors are read in the order in which they lie in the shards, several at once while they stay together below the
    size of the largest one, so the memory taken beyond the destinations is about one such tensor. Values are rounded
    to the destination's dtype on the host's side of the copy.
    Raises CheckpointError where a tensor is absent, has another shape or dtype, or its shard ends too early.
    """
    wanted = sorted(
        ((name, _info(checkpoint, name, target)) for name, target in targets.items()),
        key=lambda item: (item[1].shard, item[1].start),
    )
    for name, info, content in _read_ahead(checkpoint, wanted):
        stored = torch.frombuffer(content, dtype=STORED_DTYPES[info.dtype]).view(info.shape)
        with torch.no_grad():
            targets[name].copy_(stored)
        del stored, content  # before the next ones are read: the loop's own variables would keep one tensor too many


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


def _read_ahead(
    checkpoint: Checkpoint, wanted: Sequence[tuple[str, TensorInfo]]
) -> Iterator[tuple[str, TensorInfo, bytearray]]:
    """Yields (name, where, bytes) in order, reading ahead within the size of the largest tensor of all."""
    budget = max((info.nbytes for _, info in wanted), default=0)
    waiting, under_way = deque(wanted), deque[tuple[str, TensorInfo, Future[bytearray]]]()
    held = 0
    with ThreadPoolExecutor(_READERS) as threads:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < _READERS and held + waiting[0][1].nbytes <= budget:
                    name, info = waiting.popleft()
                    held += info.nbytes
                    under_way.append((name, info, threads.submit(checkpoint.read, info)))
                name, info, future = under_way.popleft()
                yield name, info, _content(name, future)
                del future  # or its result would stay in memory while the next ones are read
                held -= info.nbytes
        finally:
            threads.shutdown(cancel_futures=True)


def _content(name: str, future: "Future[bytearray]") -> bytearray:
    try:
        return future.result()
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name} cannot be loaded: {error}") from error


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
