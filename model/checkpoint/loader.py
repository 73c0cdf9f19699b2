"""Loads a checkpoint into existing tensors, without a second copy of the weights on the host or a device.

check_memory(checkpoint, "both", torch.bfloat16, ["cuda:0", "cuda:1"])     # before anything is allocated
load_tensors(checkpoint, {"lm_head.weight": head, "…experts.3.up_proj.weight": stacked[3], …})
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from model.checkpoint.config import Towers, expected_tensors
from model.checkpoint.reader import PIECE, Checkpoint, TensorInfo
from model.checkpoint.staging import Copies, copies_to
from model.errors import CheckpointError

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
BUFFER = 16 * 2**20
"""The bytes of one buffer on the host through which weights are loaded.

Larger buffers were slower to fill from the page cache, because they do not fit into the CPU's cache, and no faster to
fill from S3.
"""
BUFFERS = 8
"""The number of these buffers, unless the checkpoint needs fewer."""
READERS = 8
"""The number of range reads that run at once."""
_ALIGN = 64  # bytes; tensors begin at multiples of it in a buffer, so that they can be viewed in any dtype


def weight_bytes(checkpoint: Checkpoint, towers: Towers, dtype: torch.dtype) -> int:
    """Return the bytes that the weights of `towers` take in memory if all of them are in `dtype`."""
    shapes = expected_tensors(checkpoint.config, towers).values()
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def check_memory(
    checkpoint: Checkpoint,
    towers: Towers,
    dtype: torch.dtype,
    devices: Sequence[str | torch.device],
    stage_bytes: Sequence[int] | None = None,
) -> None:
    """Raise CheckpointError if the weights do not fit into the memory that is free now.

    `devices` has one name for each stage; a device that is named twice must hold both stages. `stage_bytes` are the
    bytes that each stage takes; if they are None, the weights are divided equally. The host must also have memory for
    the buffers through which the weights are loaded. Raises ValueError if there is not one of `stage_bytes` per device.
    """
    if stage_bytes is None:
        stage_bytes = [-(-weight_bytes(checkpoint, towers, dtype) // len(devices))] * len(devices)
    if len(stage_bytes) != len(devices):
        raise ValueError(f"{len(stage_bytes)} stage_bytes for {len(devices)} devices")
    on_its_way = sum(checkpoint.tensors[name].nbytes for name in expected_tensors(checkpoint.config, towers))
    needs = {"cpu": min(BUFFERS * BUFFER, on_its_way)}  # device name -> bytes of all stages on it
    for device, need in zip(devices, stage_bytes, strict=True):
        name = "cuda:0" if str(device) == "cuda" else str(device)
        needs[name] = needs.get(name, 0) + need
    for device, need in needs.items():
        free = free_memory(device)
        if need > free:
            raise CheckpointError(
                f"checkpoint {checkpoint.uri} needs {_gib(need)} in {str(dtype).removeprefix('torch.')} on {device}, "
                f"only {_gib(free)} are free: use more devices or a machine with more memory, a smaller dtype, "
                "or stop other processes there"
            )


def free_memory(device: str | torch.device) -> int:
    """Return the bytes that can still be allocated on a device; on the CPU, no more than its control group allows.

    Raises CheckpointError if the device is neither the CPU nor a GPU.
    """
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
    )  # without /proc (macOS) all memory is the best guess


def _cgroup_free(root: Path) -> int | None:
    """Return the bytes left below the memory limit of this container (cgroup v2 or v1), or None if there is no limit.

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
        if not limit.isdigit():  # "max" means no limit
            return None
        return max(0, int(limit) - usage + int(stat.get(cache_key, 0)))
    return None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The record of one tower that was loaded: its size and the time that it took. `str` gives readable text."""

    what: str
    """`context tower`, or `denoiser`, which includes the time conditioning."""
    bytes: int
    """Bytes in the checkpoint, in the stored dtype."""
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9)
        return f"{self.what} {_decimal(self.bytes)} in {self.seconds:.1f} s ({_decimal(rate)}/s)"


def load_towers(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> tuple[Loaded, ...]:
    """Load the context tower, then the denoiser with its time conditioning, as load_tensors does.

    Returns a record for each tower that has targets. Raises as load_tensors does.
    """
    names = {"context tower": expected_tensors(checkpoint.config, "context").keys() & targets.keys()}
    names["denoiser"] = targets.keys() - names["context tower"]
    loaded = []
    for what, of_tower in names.items():
        if of_tower:
            began = time.perf_counter()
            count = load_tensors(checkpoint, {name: targets[name] for name in of_tower})
            loaded.append(Loaded(what, count, time.perf_counter() - began))
    return tuple(loaded)


def load_tensors(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> int:
    """Fill `targets` from the checkpoint and return the number of bytes read.

    `targets` maps a checkpoint name to a contiguous tensor, or slice of one, on any device and in any float dtype. The
    shards are read in order, through BUFFERS buffers on the host. Several threads read pieces into some buffers while
    the others are copied to the device. The buffers are the only memory needed beside the targets, with two exceptions:
    pieces that are being read from remote storage, and, on a device, the tensor that is being converted to another
    dtype. Values are rounded once, to the target's dtype, on its device.

    Raises CheckpointError if a tensor is missing, has another shape or is not stored as a float, or if its shard cannot
    be read or ends too early. Raises ValueError if a target is not contiguous.
    """
    infos = {name: _info(checkpoint, name, target) for name, target in targets.items()}
    wanted = sorted(
        ((name, info) for name, info in infos.items() if info.nbytes), key=lambda item: (item[1].shard, item[1].start)
    )
    count = sum(info.nbytes for _, info in wanted)
    # no larger than a small checkpoint needs, even if each tensor has to be aligned
    size = min(BUFFER, _aligned(count) + _ALIGN * len(wanted))
    with ThreadPoolExecutor(READERS) as threads, torch.no_grad():
        try:
            _load(checkpoint, targets, list(_fills(wanted, size)), size, threads)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return count


class _Chunk(NamedTuple):
    """Bytes [start, start + length) of a tensor, and their place `at` in a buffer."""

    name: str
    info: TensorInfo
    start: int
    length: int
    at: int


class _Filling(NamedTuple):
    """A buffer that is being filled, with its chunks and the reads in progress for each of them."""

    buffer: torch.Tensor
    chunks: "list[tuple[_Chunk, list[Future[None]]]]"


def _load(
    checkpoint: Checkpoint,
    targets: Mapping[str, torch.Tensor],
    fills: Sequence[Sequence[_Chunk]],
    size: int,
    threads: ThreadPoolExecutor,
) -> None:
    """Fill `targets` through buffers of `size` bytes; each list in `fills` is the content of one buffer."""
    copies = copies_to(target.device for target in targets.values())
    # each buffer, with a function that waits until the copies out of it are done
    free: deque[tuple[torch.Tensor, Callable[[], object]]] = deque()
    free.extend((copies.buffer(size), copies.mark()) for _ in range(min(BUFFERS, len(fills))))
    filling: deque[_Filling] = deque()
    for chunks in fills:
        if len(filling) == BUFFERS - 1:  # the copies out of one buffer run while the others are filled
            free.append((_empty(filling.popleft(), targets, copies), copies.mark()))
        buffer, wait = free.popleft()
        wait()
        filling.append(_Filling(buffer, [(chunk, _read(threads, checkpoint, chunk, buffer)) for chunk in chunks]))
    while filling:
        _empty(filling.popleft(), targets, copies)
    copies.mark()()


def _read(
    threads: ThreadPoolExecutor, checkpoint: Checkpoint, chunk: _Chunk, buffer: torch.Tensor
) -> "list[Future[None]]":
    """Start the reads that fill a chunk's place in the buffer, of at most PIECE bytes each."""
    memory = memoryview(buffer.numpy())[chunk.at : chunk.at + chunk.length]  # type: ignore[arg-type]  # it is a buffer
    return [
        threads.submit(checkpoint.read_into, chunk.info, chunk.start + at, memory[at : at + PIECE])
        for at in range(0, chunk.length, PIECE)
    ]


def _empty(filling: _Filling, targets: Mapping[str, torch.Tensor], copies: Copies) -> torch.Tensor:
    """Start the copies from a buffer to the targets, each when its chunk has been read, and return the buffer."""
    for chunk, reads in filling.chunks:
        try:
            _ = [read.result() for read in reads]
        except CheckpointError as error:
            raise CheckpointError(f"tensor {chunk.name} cannot be loaded: {error}") from error
        stored = STORED_DTYPES[chunk.info.dtype]
        source = filling.buffer[chunk.at : chunk.at + chunk.length].view(stored)
        first = chunk.start // stored.itemsize
        copies.copy(targets[chunk.name].view(-1)[first : first + len(source)], source)
    return filling.buffer


def _fills(wanted: Sequence[tuple[str, TensorInfo]], size: int) -> Iterator[list[_Chunk]]:
    """Divide the wanted tensors among buffers of `size` bytes: yield the chunks of one buffer after the other.

    A tensor may continue in the next buffer.
    """
    chunks, used = list[_Chunk](), 0
    for name, info in wanted:
        start = 0
        while start < info.nbytes:
            if (at := _aligned(used)) >= size:
                yield chunks
                chunks, at = [], 0
            length = min(info.nbytes - start, size - at)
            chunks.append(_Chunk(name, info, start, length, at))
            start, used = start + length, at + length
    if chunks:
        yield chunks


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _info(checkpoint: Checkpoint, name: str, target: torch.Tensor) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"checkpoint {checkpoint.uri}: tensor {name} is missing")
    if info.dtype not in STORED_DTYPES:
        raise CheckpointError(f"checkpoint {checkpoint.uri}: tensor {name} is stored as {info.dtype}, not as a float")
    if info.shape != tuple(target.shape):
        raise CheckpointError(
            f"checkpoint {checkpoint.uri}: tensor {name} is {list(info.shape)} in {info.shard}, "
            f"but must be {list(target.shape)}"
        )
    if not target.is_contiguous():
        raise ValueError(f"the target of {name} is not contiguous")
    return info


def _decimal(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
