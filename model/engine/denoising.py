"""Keeps the blocks that are being filled, as arrays on the host that are updated for all rows of a forward at once.

There is one block per slot. model.engine.unmasking decides on the device which tokens a step commits; this module
records them. In mock_ar mode a block is one token. In AR mode a block is the tokens that the row generates in one turn,
each predicted by a forward of its own. Rows may differ in block size: positions beyond a row's own block size are never
masked.

Shapes: R rows of a forward, N tokens of all their blocks, S positions of the longest block, M predicted positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from model.engine.backend import BlockReport
from model.engine.sequence import ActiveRow
from model.kernels.logits import Draws
from model.runtime.transfer import Array, send

_SETTINGS = np.dtype(
    [
        ("size", "i8"),  # of a block; 0 in AR mode, in which each turn decides it
        ("steps_limit", "i8"),
        ("threshold", "f4"),
        ("temperature", "f4"),
        ("top_k", "i8"),
        ("top_p", "f8"),
        ("key", "i8", 2),
        ("diffusion", "?"),
        ("denoised", "?"),  # not in AR mode: denoiser forwards fill the blocks, and are counted
        ("watched", "?"),  # has stop strings: every new token may end the row
    ]
)


class DenoisingState:
    """The block that each slot is filling, and the settings of its row.

    A position that is not committed yet holds `mask_id`; in mock_ar mode it holds the row's newest token, which is the
    input of the next forward.
    """

    def __init__(self, slots: int, mask_id: int) -> None:
        self.mask_id = mask_id
        self._settings = np.zeros(slots, _SETTINGS)
        self._eos = np.full((slots, 1), -1)
        self._tokens = np.full((slots, 1), mask_id)
        self._masked = np.zeros((slots, 1), bool)
        self._confidence = np.zeros((slots, 1), np.float32)
        self._size = np.zeros(slots, np.int64)
        # the row's number of blocks (in the modes ar and mock_ar: of tokens) before this one; the steps it has taken
        self._counters = np.zeros((slots, 2), np.int64)
        self._room = np.zeros(slots, np.int64)  # tokens that max_new_tokens allows from the start of the block on
        self._ready = np.zeros(slots, np.int64)  # committed positions before the first masked one

    def add_slots(self, count: int) -> None:
        """Add `count` empty slots, numbered after the existing ones."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, np.concatenate([value, np.zeros((count, *value.shape[1:]), value.dtype)]))

    def enter(self, row: ActiveRow) -> None:
        """Record the settings of a row that has just got its slot."""
        params, slot = row.request.params, row.slot
        diffusion = params.mode == "diffusion"
        size = params.block_size if diffusion else 1
        self._settings[slot] = (
            0 if params.mode == "ar" else size,
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
        self._widen(size)
        self._eos = _widened(self._eos, len(params.eos_ids), -1)
        self._eos[slot] = -1
        self._eos[slot, : len(params.eos_ids)] = params.eos_ids

    def _widen(self, size: int) -> None:
        """Make room for blocks of `size` tokens in all slots."""
        self._tokens, self._masked, self._confidence = (
            _widened(array, size) for array in (self._tokens, self._masked, self._confidence)
        )

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """Begin a new block, with all positions masked, for each of the rows.

        In AR mode the block has `ar_tokens` tokens, or fewer if max_new_tokens leaves room for fewer. A row that has
        begun a block for which nothing was predicted yet may begin it again.
        """
        slots = _slots(rows)
        room = np.array([row.room for row in rows])
        fixed = self._settings["size"][slots]
        sizes = np.where(fixed > 0, fixed, np.minimum(ar_tokens, room))
        self._widen(int(sizes.max()))
        self._size[slots] = sizes
        self._tokens[slots] = self.mask_id
        self._masked[slots] = np.arange(self._masked.shape[1]) < sizes[:, None]
        self._confidence[slots] = 0
        self._ready[slots] = 0
        self._counters[slots] = [[len(row.steps) if row.mode == "diffusion" else len(row.tokens), 0] for row in rows]
        self._room[slots] = room
        for row in rows:
            if row.mode == "mock_ar":  # the denoiser predicts the token after the newest one
                self._tokens[row.slot, 0] = row.last_token

    def take(self, rows: Sequence[ActiveRow]) -> "Filling":
        """Return the blocks of these rows as they are now, for a forward that predicts their masked positions."""
        slots = _slots(rows)
        sizes = self._size[slots]
        width = int(sizes.max())  # not the table's width: large blocks of other rows must cost nothing here
        masked = self._masked[slots, :width]
        steps_left = self._settings["steps_limit"][slots] - self._counters[slots, 1]
        return Filling(rows, slots, sizes, masked, self._settings["threshold"][slots], steps_left)

    def inputs(self, filling: "Filling") -> tuple[Array, Array]:
        """Return the inputs of a denoiser forward: the tokens of all blocks (N,) int64, and the masked fraction t of
        each block (R,) float32, which is NaN in mock_ar mode, because that has no time conditioning."""
        slots, masked = filling.slots, filling.masked
        inside = np.arange(masked.shape[1]) < filling.sizes[:, None]
        t = np.where(self._settings["diffusion"][slots], masked.sum(-1) / filling.sizes, np.nan)
        return self._tokens[slots][:, : masked.shape[1]][inside], t.astype(np.float32)

    def targets(self, filling: "Filling", which: Array, position: Array, token: Array) -> "Targets":
        """Return the M positions that a forward predicts, with the settings for choosing their tokens.

        Prediction i is for position `position[i]` in the block of row `which[i]` of the filling, and is made from token
        `token[i]` of the forward's N tokens. In AR mode each position is predicted by a forward of its own, and the
        random numbers are counted as if it were a block of its own.
        """
        settings, place = self._settings[filling.slots], which * filling.masked.shape[1] + position
        if not (settings["temperature"] > 0).any():
            return Targets(token, place, settings["diffusion"][which], None)
        settings, slots = settings[which], filling.slots[which]
        sampled = settings["temperature"] > 0
        limited = (settings["top_k"] > 0) | (settings["top_p"] < 1)
        counters, ar = self._counters[slots], settings["size"] == 0
        counters[:, 0] += np.where(ar, position, 0)
        position = np.where(ar, 0, position)
        columns = [settings[name].astype(kind) for name, kind in (("temperature", float), ("top_k", int))]
        columns += [settings["top_p"], settings["key"].flatten(), np.column_stack([counters, position]).flatten()]
        return Targets(
            token,
            place,
            settings["diffusion"],
            [*columns, np.flatnonzero(sampled & ~limited), np.flatnonzero(sampled & limited)],
        )

    def fill(self, filling: "Filling", predicted: torch.Tensor) -> list[BlockReport]:
        """Record what a forward committed and return reports on the blocks that the loop must look at.

        predicted: (2, R, S) int32 on the host, from `commit` or `commit_in_order` of model.engine.unmasking. Rows that
        have ended since the launch are skipped, because other rows may already hold their slots.
        """
        (ids, bits), masked = predicted.numpy(), filling.masked
        sure = bits.view(np.float32)
        alive = [i for i, row in enumerate(filling.rows) if not row.ended]
        if len(alive) == len(filling.rows):
            return self._store(filling.rows, filling.slots, masked, ids, sure)
        rows, slots = [filling.rows[i] for i in alive], filling.slots[alive]
        return self._store(rows, slots, masked[alive], ids[alive], sure[alive]) if alive else []

    def _store(
        self, rows: Sequence[ActiveRow], slots: Array, masked: Array, ids: Array, sure: Array
    ) -> list[BlockReport]:
        """Record what was committed and return reports on the blocks that the loop must look at.

        slots: (R,). masked: (R, S), which positions were masked. ids: (R, S), the committed ids or -1. sure: (R, S),
        the confidences of the predictions, NaN where the logits were not finite.
        """
        width, taken = masked.shape[1], ids >= 0
        broken = _any(masked & np.isnan(sure))
        tokens = np.where(taken, ids, self._tokens[slots][:, :width])
        confidence = np.where(taken, sure, self._confidence[slots][:, :width])
        masked = masked & ~taken
        self._tokens[slots, :width], self._confidence[slots, :width] = tokens, confidence
        self._masked[slots, :width] = masked
        self._counters[slots, 1] += self._settings["denoised"][slots]
        return self._look(rows, slots, masked, tokens, confidence, broken)

    def _look(
        self, rows: Sequence[ActiveRow], slots: Array, masked: Array, tokens: Array, confidence: Array, broken: Array
    ) -> list[BlockReport]:
        """Return reports on the blocks that are full, that may have ended their row, or whose logits were not finite
        (broken, (R,) bool). The other arrays are the blocks after the commit, (R, S)."""
        complete = ~_any(masked)
        ready = np.where(complete, self._size[slots], masked.argmax(-1))
        more = ready > self._ready[slots]
        self._ready[slots] = ready
        new = np.arange(masked.shape[1]) < ready[:, None]
        eos = _any(_any(tokens[..., None] == self._eos[slots][:, None]) & new)
        may_end = eos | (ready >= self._room[slots]) | (self._settings["watched"][slots] & more)
        which = np.nonzero(broken | complete | may_end)[0]
        columns = (ready, complete, may_end, broken, self._counters[slots, 1], tokens, confidence)
        lists = zip(which.tolist(), *(column[which].tolist() for column in columns), strict=True)
        return [BlockReport(rows[i], *values) for i, *values in lists]


class Filling(NamedTuple):
    """The blocks of the rows of a forward, as they were when it was launched, for predicting their masked positions."""

    rows: Sequence[ActiveRow]
    slots: Array  # (R,)
    sizes: Array  # (R,) tokens of each block
    masked: Array  # (R, S) bool
    threshold: Array  # (R,) float32
    steps_left: Array  # (R,) steps that may still be taken in the block, this one included


class Targets(NamedTuple):
    """The M positions that a forward predicts and the settings for choosing their tokens, as arrays on the host."""

    token: Array  # (M,) index, among the forward's N tokens, of the one that predicts the position
    place: Array  # (M,) index of the position into R * S
    suppress: Array  # (M,) bool: True if the mask id must not be chosen
    draws: list[Array] | None  # the fields of Draws, flat; None if all rows are greedy

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Draws | None]:
        """Return token, suppress and draws on the device, sent there in one copy; draws is None if all rows are
        greedy."""
        token, suppress, *draws = send(device, self.token, self.suppress, *(self.draws or ()))
        if not draws:
            return token, suppress.bool(), None
        temperature, top_k, top_p, key, counter, free, limited = draws
        counter = counter.view(-1, 3)
        return token, suppress.bool(), Draws(temperature.float(), top_k, top_p, key.view(-1, 2), counter, free, limited)


def _slots(rows: Sequence[ActiveRow]) -> Array:
    return np.array([row.slot for row in rows], dtype=np.int64)


def _any(array: Array) -> Array:
    """Return whether any value along the last axis is true."""
    return np.asarray(array.any(axis=-1))


def _widened(array: Array, width: int, value: int = 0) -> Array:
    """Return the array with at least `width` columns; new columns are filled with `value`."""
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more)), constant_values=value) if more > 0 else array
