"""The blocks that are being filled, one a slot, as arrays on the host: a step handles all rows of a forward at once.

In the AR modes a token is a block of one position. Rows differ in block size: positions behind a row's own size are
never masked.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.backend import Seen
from model.lanes import ActiveRow
from model.sampling import Draws
from model.unmasking import positions_to_commit

Array = npt.NDArray[Any]

_SETTINGS = np.dtype(
    [
        ("size", "i8"),
        ("steps_limit", "i8"),
        ("threshold", "f4"),
        ("temperature", "f4"),
        ("top_k", "i8"),
        ("top_p", "f8"),
        ("key", "i8", 2),
        ("diffusion", "?"),
        ("denoised", "?"),  # by a denoiser forward, so that its steps count
        ("watched", "?"),  # for stop strings: every new token may end it
    ]
)


class BlockTable:
    """One block a slot. `mask_id` stands where nothing is committed yet."""

    def __init__(self, slots: int, mask_id: int) -> None:
        self.mask_id = mask_id
        self._settings = np.zeros(slots, _SETTINGS)
        self._eos = np.full((slots, 1), -1)
        self._tokens = np.full((slots, 1), mask_id)
        self._masked = np.zeros((slots, 1), bool)
        self._confidence = np.zeros((slots, 1), np.float32)
        self._counters = np.zeros((slots, 2), np.int64)  # the block's number, the steps it has taken
        self._room = np.zeros(slots, np.int64)  # tokens that the completion may still take, from the block's start
        self._ready = np.zeros(slots, np.int64)

    def add_slots(self, count: int) -> None:
        """More slots behind the others."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, np.concatenate([value, np.zeros((count, *value.shape[1:]), value.dtype)]))

    def enter(self, row: ActiveRow) -> None:
        """Notes the settings of a row that has got its slot."""
        params, slot = row.request.params, row.slot
        diffusion = params.mode == "diffusion"
        size = params.block_size if diffusion else 1
        self._settings[slot] = (
            size,
            params.steps_per_block if diffusion else 1,
            params.confidence_threshold,
            params.temperature,
            params.top_k or 0,
            params.top_p or 1.0,
            row.request.sampling_key,
            diffusion,
            params.mode != "ar",
            bool(params.stop),
        )
        self._tokens, self._masked, self._confidence = (
            _widened(array, size) for array in (self._tokens, self._masked, self._confidence)
        )
        self._eos = _widened(self._eos, len(params.eos_ids), -1)
        self._eos[slot] = -1
        self._eos[slot, : len(params.eos_ids)] = params.eos_ids

    def begin(self, rows: Sequence[ActiveRow]) -> None:
        """A new block, all masked, for each of the rows."""
        slots = _slots(rows)
        self._tokens[slots] = self.mask_id
        self._masked[slots] = np.arange(self._masked.shape[1]) < self._settings["size"][slots][:, None]
        self._confidence[slots] = 0
        self._ready[slots] = 0
        self._counters[slots] = [[len(row.steps) if row.mode == "diffusion" else len(row.tokens), 0] for row in rows]
        self._room[slots] = [row.room for row in rows]
        for row in rows:
            if row.mode == "mock_ar":  # the denoiser predicts what follows the newest token
                self._tokens[row.slot, 0] = row.last_token

    def take(self, rows: Sequence[ActiveRow]) -> "Filling":
        """The blocks of these rows as they are now, for a forward to predict what is masked in them."""
        slots = _slots(rows)
        width = int(self._settings["size"][slots].max())  # not the table's: one row's huge block is not all rows' cost
        return Filling(rows, slots, self._masked[slots, :width])

    def inputs(self, filling: "Filling") -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a denoiser forward: tokens a row, all tokens (N,), t (R,) and which of the N are to be predicted (N,)."""
        slots, masked = filling.slots, filling.masked
        sizes = self._settings["size"][slots]
        inside = np.arange(masked.shape[1]) < sizes[:, None]
        t = np.where(self._settings["diffusion"][slots], masked.sum(-1) / sizes, np.nan).astype(np.float32)
        tokens, picked = self._tokens[slots][:, : masked.shape[1]][inside], masked[inside]
        return sizes.tolist(), torch.from_numpy(tokens), torch.from_numpy(t), torch.from_numpy(picked)

    def draws(self, filling: "Filling", device: torch.device) -> tuple[torch.Tensor, Draws | None]:
        """For the positions to be predicted (M,): where the mask id is suppressed, and how they are sampled.

        Draws are None where all are greedy.
        """
        settings, counts = self._settings[filling.slots], filling.masked.sum(-1)
        suppress = torch.from_numpy(np.repeat(settings["diffusion"], counts)).to(device)
        if not (settings["temperature"] > 0).any():
            return suppress, None
        which, position = np.nonzero(filling.masked)
        slots, settings = filling.slots[which], settings[which]
        counter = np.concatenate([self._counters[slots], position[:, None]], axis=1)
        columns = [settings[name].copy() for name in ("temperature", "top_k", "top_p", "key")]
        return suppress, Draws(*(torch.from_numpy(column).to(device) for column in (*columns, counter)))

    def fill(self, filling: "Filling", tokens: torch.Tensor, confidence: torch.Tensor) -> list[Seen]:
        """Commits what a forward predicted, by each row's own rule -> the blocks that need attention.

        tokens, confidence (M,) on the host: the masked positions, row after row. Rows that have ended in the meantime
        are passed over: their slots may be others' already.
        """
        masked = filling.masked
        chosen = np.full(masked.shape, self.mask_id)
        chosen[masked] = tokens.numpy()
        sure = np.zeros(masked.shape, np.float32)
        sure[masked] = confidence.numpy()
        alive = [i for i, row in enumerate(filling.rows) if not row.ended]
        if len(alive) < len(filling.rows):
            rows, slots = [filling.rows[i] for i in alive], filling.slots[alive]
            return self._commit(rows, slots, masked[alive], chosen[alive], sure[alive]) if alive else []
        return self._commit(filling.rows, filling.slots, masked, chosen, sure)

    def _commit(self, rows: Sequence[ActiveRow], slots: Array, masked: Array, chosen: Array, sure: Array) -> list[Seen]:
        """All (R, S): which positions were masked, what was predicted for them, with what probability."""
        settings, width = self._settings[slots], masked.shape[1]
        broken = _any(masked & np.isnan(sure))
        steps_left = settings["steps_limit"] - self._counters[slots, 1]
        threshold = settings["threshold"].copy()
        commit = positions_to_commit(*(torch.from_numpy(a) for a in (masked, sure, threshold, steps_left))).numpy()
        commit = commit & ~broken[:, None]
        tokens = np.where(commit, chosen, self._tokens[slots][:, :width])
        confidence = np.where(commit, sure, self._confidence[slots][:, :width])
        masked = masked & ~commit
        self._tokens[slots, :width], self._confidence[slots, :width] = tokens, confidence
        self._masked[slots, :width] = masked
        self._counters[slots, 1] += settings["denoised"]
        return self._look(rows, slots, masked, tokens, confidence, broken)

    def _look(
        self, rows: Sequence[ActiveRow], slots: Array, masked: Array, tokens: Array, confidence: Array, broken: Array
    ) -> list[Seen]:
        """The blocks that are full, that may have ended their row, or that are broken."""
        complete = ~_any(masked)
        ready = np.where(complete, self._settings["size"][slots], masked.argmax(-1))
        more = ready > self._ready[slots]
        self._ready[slots] = ready
        new = np.arange(masked.shape[1]) < ready[:, None]
        eos = _any(_any(tokens[..., None] == self._eos[slots][:, None]) & new)
        may_end = eos | (ready >= self._room[slots]) | (self._settings["watched"][slots] & more)
        which = np.nonzero(broken | complete | may_end)[0]
        columns = (ready, complete, may_end, broken, self._counters[slots, 1], tokens, confidence)
        lists = zip(which.tolist(), *(column[which].tolist() for column in columns), strict=True)
        return [Seen(rows[i], *values) for i, *values in lists]


class Filling(NamedTuple):
    """Blocks that a forward under way predicts."""

    rows: Sequence[ActiveRow]
    slots: Array  # (R,)
    masked: Array  # (R, S), when it was launched


def _slots(rows: Sequence[ActiveRow]) -> Array:
    return np.array([row.slot for row in rows], dtype=np.int64)


def _any(array: Array) -> Array:
    """Whether any is true along the last axis."""
    return np.asarray(array.any(axis=-1))


def _widened(array: Array, width: int, value: int = 0) -> Array:
    """The array with at least `width` columns, new ones filled with `value`."""
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more)), constant_values=value) if more > 0 else array
