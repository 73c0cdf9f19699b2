"""Counts the bytes of the tensors that are alive, on any device, as torch's allocators would."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """A context manager that counts memory: `peak` is the largest number of bytes of storages alive at one time.

    Only storages that are made by an operation inside the block count, each once, however many views share it, and
    until it is freed. Memory that an operation allocates and frees within itself is not seen. `live` is the number of
    bytes now.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}  # id of a storage -> the bytes counted for it

    def reset(self) -> None:
        """Forget the peak so far and start a new one; storages that are alive stay counted."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, ours=False)  # a storage that is not known yet is older than the meter
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._see(tensor, ours=True)
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, tensor: torch.Tensor, *, ours: bool) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = storage.nbytes() if ours else 0
        self._known[id(storage)] = size
        self.live += size
        weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
