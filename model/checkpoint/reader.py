"""Reads a checkpoint in place: its config, the contents of its safetensors shards and its identity.

    checkpoint = open_checkpoint("builtin:tiny" | "/a/folder" | "s3://bucket/folder" | "hf://org/name")
    checkpoint.validate("both")            # complete, right shapes, nothing unknown, no shard cut short
    checkpoint.identity()                  # the same for a copy elsewhere
    checkpoint.chat_texts()                # the chat template and the special tokens for it

A shard is read by ranges: 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, byte
range), then single tensors. Format: https://github.com/huggingface/safetensors. This module does not import torch. It
is the only one in `model` that reads a checkpoint's files; model/checkpoint/loader.py reads through it. Every error is
a CheckpointError with a message of one line.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from model.checkpoint.chat_texts import CONFIG_FILE, MAP_FILE, TEMPLATE_FILE, ChatTexts, chat_texts
from model.checkpoint.config import Towers, TwoTowerConfig, expected_tensors
from model.errors import CheckpointError

BUILTIN = {name: Path(__file__).parents[1] / "builtin" / "checkpoints" / name for name in ("tiny", "noise")}
"""The folders of the built-in checkpoints, by their names after `builtin:`."""
DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one element in each stored dtype that can be loaded. Quantised dtypes are refused."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the same limit as in the safetensors library
PIECE = 8 * 2**20  # bytes; the most that one range read asks for, so that a large tensor is never in memory twice
_WHOLE = 16 * 2**20  # bytes; the identity covers all data of shards below this size
_SAMPLE = 64 * 2**10  # bytes; the size of each of the three samples of a larger shard
_MAX_TEXT = 4 * 2**20  # bytes; the most that a file of chat texts may have
_OPEN_THREADS = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a shard: bytes [start, end) of the file `shard`, in `dtype` (its safetensors name: F32, BF16, …)."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class _Shard:
    """The header of one shard file.

    If the file is faulty, `tensors` is None and `problem` says why; if there is no such file, `missing` is True.
    """

    name: str
    size: int = 0
    header: bytes = b""
    tensors: Mapping[str, TensorInfo] | None = None
    missing: bool = False
    problem: str | None = None


class Checkpoint:
    """An opened checkpoint, which open_checkpoint() returns: its config, and where each tensor is in its shards.

    No weights are in memory; they are read on demand.
    """

    def __init__(self, uri: str, folder: "_Folder") -> None:
        self.uri = uri
        self._folder = folder
        self._config_json = bytes(folder.read("config.json"))
        try:
            self.config = TwoTowerConfig.from_dict(_json_object(self._config_json, "config.json"))
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {uri}: {error}") from error
        self._weight_map = _weight_map(folder)
        with ThreadPoolExecutor(_OPEN_THREADS) as threads:
            self._shards = tuple(threads.map(folder.open_shard, sorted(set(self._weight_map.values()))))
        self.tensors: dict[str, TensorInfo] = {}
        self._duplicates: list[str] = []
        for shard in self._shards:
            self._duplicates += [name for name in shard.tensors or () if name in self.tensors]
            self.tensors |= shard.tensors or {}
        self._identity: str | None = None

    def validate(self, towers: Towers = "both") -> None:
        """Raise CheckpointError if a tensor that `towers` needs is missing or has a wrong shape, or if one is unknown.

        Their dtypes must be in DTYPE_BYTES, and no tensor may be stored twice. "context" (AR mode) needs only the
        context tower and its head; shards that contain none of these may be missing or corrupt.
        """
        expected = expected_tensors(self.config, towers)
        known = expected_tensors(self.config, "both")
        needed = {shard for name, shard in self._weight_map.items() if name in expected or shard == _SINGLE}
        shards = [shard for shard in self._shards if shard.name in needed]
        self._refuse("shard", "missing", [shard.name for shard in shards if shard.missing])
        self._refuse("shard", "corrupt", [f"{shard.name} ({shard.problem})" for shard in shards if shard.problem])
        self._refuse("tensor", "missing", [name for name in expected if name not in self.tensors])
        unknown = sorted({*self.tensors, *self._weight_map} - known.keys() - {""})
        self._refuse("tensor", "unknown to this model", unknown)
        self._refuse("tensor", "stored twice", self._duplicates)
        found = {name: self.tensors[name] for name in expected}
        dtypes = [f"{name} ({info.dtype})" for name, info in found.items() if info.dtype not in DTYPE_BYTES]
        self._refuse("tensor", f"not stored as {', '.join(DTYPE_BYTES)}", dtypes)
        shapes = [
            f"{name} is {list(info.shape)}, config.json says {list(expected[name])}"
            for name, info in found.items()
            if info.shape != expected[name]
        ]
        self._refuse("tensor", "of the wrong shape", shapes)

    def _refuse(self, noun: str, fault: str, items: list[str]) -> None:
        if items:
            verb = f"{noun} is" if len(items) == 1 else f"{noun}s are"
            more = f" and {len(items) - 3} more" if len(items) > 3 else ""
            raise CheckpointError(f"checkpoint {self.uri}: {len(items)} {verb} {fault}: {', '.join(items[:3])}{more}")

    def identity(self) -> str:
        """Return 64 hex digits that are the same for every copy of a checkpoint, wherever and whenever it was stored.

        They are the sha256 of config.json, tokenizer.json and, for each shard in name order, its size, header and data.
        Of a shard of 16 MiB or more, only three samples of 64 KiB are read, to be fast. So a change that keeps the
        sizes, the headers and all samples is not noticed. Missing shards (AR mode) are left out. Raises CheckpointError
        if a file cannot be read.
        """
        if self._identity is None:
            digest = hashlib.sha256()
            parts: list[bytes] = [self._config_json, self.tokenizer_json() or b""]
            with ThreadPoolExecutor(_OPEN_THREADS) as threads:
                parts += threads.map(self._shard_digest, (s for s in self._shards if not s.missing))
            for part in parts:
                digest.update(len(part).to_bytes(8, "little") + part)
            self._identity = digest.hexdigest()
        return self._identity

    def _shard_digest(self, shard: _Shard) -> bytes:
        digest = hashlib.sha256(shard.size.to_bytes(8, "little") + shard.header)
        data = min(8 + len(shard.header), shard.size)
        ranges = [(data, shard.size)]
        if shard.size >= _WHOLE:
            starts = (data, (data + shard.size) // 2, shard.size - _SAMPLE)
            ranges = [(start, start + _SAMPLE) for start in starts]
        for start, end in ranges:
            digest.update(self._folder.read(shard.name, start, end))
        return digest.digest()

    def read(self, info: TensorInfo) -> bytearray:
        """Return the bytes of one tensor, little-endian, in C order.

        Raises CheckpointError if its shard cannot be read or ends early.
        """
        return self._folder.read(info.shard, info.start, info.end)

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of one tensor from byte `offset` of the tensor on.

        Raises as read() does. Several threads may call this at once.
        """
        self._folder.read_into(info.shard, info.start + offset, buffer)

    def tokenizer_json(self) -> bytes | None:
        """Return the content of tokenizer.json, or None if the checkpoint has none."""
        return bytes(self._folder.read("tokenizer.json")) if self._folder.size("tokenizer.json") is not None else None

    def chat_texts(self) -> ChatTexts:
        """Return the chat template and the special tokens that stand beside the checkpoint, as far as they are there.

        They are not part of the identity. Raises CheckpointError if one of the files cannot be read, is larger than
        4 MiB, is not UTF-8, or does not hold what it should.
        """
        template, *files = (self._small_text(name) for name in (TEMPLATE_FILE, CONFIG_FILE, MAP_FILE))
        try:
            config, token_map = (
                {} if text is None else _json_object(text, name)
                for text, name in zip(files, (CONFIG_FILE, MAP_FILE), strict=True)
            )
            return chat_texts(template, config, token_map)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self.uri}: {error}") from error

    def _small_text(self, name: str) -> str | None:
        """Return the content of a small UTF-8 file, or None if there is no such file."""
        size = self._folder.size(name)
        if size is None:
            return None
        if size > _MAX_TEXT:
            raise CheckpointError(f"checkpoint {self.uri}: {name} has {size} bytes: at most {_MAX_TEXT} are read")
        try:
            return self._folder.read(name, 0, size).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"checkpoint {self.uri}: {name} is not UTF-8: {_text(error)}") from error


def open_checkpoint(uri: str) -> Checkpoint:
    """Open a checkpoint: read its config, its index and the headers of its shards, but no weights.

    `uri` is a built-in name ("builtin:tiny" or "builtin:noise"), a local folder, or any fsspec URL (s3://…; hf://org/name
    with huggingface_hub installed). Raises CheckpointError if it cannot be read, if its config.json is not supported or
    if it lists no shards. Faults of the shards are reported by Checkpoint.validate(), which knows the towers that are
    needed.
    """
    if uri.startswith("builtin:"):
        name = uri.removeprefix("builtin:")
        if name not in BUILTIN:
            raise CheckpointError(f"no built-in checkpoint {name!r}: there are {', '.join(BUILTIN)}")
        return Checkpoint(uri, _Folder(uri, str(BUILTIN[name])))
    if not uri:
        raise CheckpointError("the checkpoint is an empty string: give a folder, an s3:// or hf:// URL or builtin:tiny")
    shown = re.sub(r"(?<=://)[^/]*@", "", uri).partition("?")[0] if "://" in uri else uri  # without user and password
    return Checkpoint(shown, _Folder(shown, uri))


class _Folder:
    """The files of a checkpoint's folder on any fsspec file system. Every storage error becomes a CheckpointError."""

    def __init__(self, uri: str, url: str) -> None:
        self.uri = uri
        with self._one_line(uri):
            self._fs, self._root = fsspec.core.url_to_fs(url)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """Turn every error while the context is open into a CheckpointError of one line about the file `what`."""
        try:
            yield
        except CheckpointError:
            raise
        except ImportError as error:
            raise CheckpointError(
                f"checkpoint {self.uri}: a package is missing for this URL: {_text(error)}"
            ) from error
        except FileNotFoundError as error:
            raise CheckpointError(f"checkpoint {self.uri}: {what} is missing") from error
        except (
            Exception
        ) as error:  # file systems raise all kinds of errors: botocore, aiohttp and the hub share no base class
            raise CheckpointError(f"checkpoint {self.uri}: cannot read {what}: {_text(error)}") from error

    def size(self, name: str) -> int | None:
        """Return the number of bytes of a file, or None if there is no such file."""
        with self._one_line(name):
            try:
                info: Mapping[str, Any] = self._fs.info(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """Return bytes [start, end) of a file, or all bytes from `start` on if `end` is None.

        Raises CheckpointError if the file is missing, cannot be read or ends early.
        """
        if end is None:
            end = self.size(name)
            if end is None:
                raise CheckpointError(f"checkpoint {self.uri}: {name} is missing")
        content = bytearray(end - start)
        self.read_into(name, start, memoryview(content))
        return content

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file on, PIECE bytes at a time. Raises as `read` does."""
        for at in range(0, len(buffer), PIECE):
            piece = buffer[at : at + PIECE]
            with self._one_line(name):
                got = self._read_piece(self._path(name), start + at, piece)
            if got != len(piece):
                raise CheckpointError(
                    f"checkpoint {self.uri}: {name} ends early: of {len(piece)} bytes from {start + at} on it has {got}"
                )

    def _read_piece(self, path: str, start: int, buffer: memoryview) -> int:
        if isinstance(self._fs, LocalFileSystem):  # straight into the buffer: half the memory, one copy less
            with open(path, "rb") as file:
                file.seek(start)
                return file.readinto(buffer)
        got: bytes = self._fs.cat_file(path, start=start, end=start + len(buffer))
        buffer[: len(got)] = got[: len(buffer)]
        return len(got)

    def open_shard(self, name: str) -> _Shard:
        """Read the header of one shard. A faulty file sets `problem`; only storage errors raise CheckpointError."""
        size = self.size(name)
        if size is None:
            return _Shard(name, missing=True)
        if size < 8:
            return _Shard(name, size, problem=f"{size} bytes long")
        length = int.from_bytes(self.read(name, 0, 8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            return _Shard(name, size, problem=f"its header claims {length} bytes in a file of {size}")
        header = bytes(self.read(name, 8, 8 + length))
        try:
            return _Shard(name, size, header, _parse_header(name, size, header))
        except CheckpointError as error:
            return _Shard(name, size, header, problem=str(error))


def _parse_header(shard: str, size: int, header: bytes) -> dict[str, TensorInfo]:
    """Return the tensors of a shard of `size` bytes by name, from its header.

    Raises CheckpointError if the header is malformed or its tensors do not fill the shard exactly. The message is a
    fragment that the caller completes.
    """
    entries = _json_object(header, "its header")
    entries.pop("__metadata__", None)
    data = 8 + len(header)
    tensors = {}
    for name, entry in entries.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not isinstance(dtype, str) or any(type(i) is not int or i < 0 for i in (*shape, start, end)):
                raise ValueError
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"its header entry for {name} is malformed") from error
        tensors[name] = TensorInfo(shard, dtype, shape, data + start, data + end)
    last = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != last:
            raise CheckpointError(f"{name} begins at byte {info.start}, but must begin at {last}")
        if info.nbytes < 0 or (
            info.dtype in DTYPE_BYTES and info.nbytes != _count(info.shape) * DTYPE_BYTES[info.dtype]
        ):
            raise CheckpointError(f"{name} has {info.nbytes} bytes for shape {list(info.shape)} in {info.dtype}")
        last = info.end
    if last != size:
        raise CheckpointError(f"its header describes {last} bytes, the file has {size}")
    return tensors


def _weight_map(folder: _Folder) -> dict[str, str]:
    """Return the name of the shard of each tensor, by tensor name; {"": model.safetensors} if there is no index.

    Raises CheckpointError if there is neither an index nor that file, or if the index is malformed.
    """
    if folder.size(_INDEX) is None:
        if folder.size(_SINGLE) is None:
            raise CheckpointError(f"checkpoint {folder.uri}: it has neither {_INDEX} nor {_SINGLE}")
        return {"": _SINGLE}
    try:
        weight_map = _json_object(folder.read(_INDEX), _INDEX).get("weight_map")
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {folder.uri}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"checkpoint {folder.uri}: {_INDEX} has no weight_map of tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or "/" in shard or "\\" in shard:
            raise CheckpointError(
                f"checkpoint {folder.uri}: {_INDEX} names {shard!r} as the shard of {name}: this is not a file name"
            )
    return weight_map


def _json_object(content: str | bytes | bytearray, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {_text(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}: it must be an object")
    return value


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
