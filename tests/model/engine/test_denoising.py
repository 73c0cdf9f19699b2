"""Tests the table of blocks by itself, in a case that the engine's tests do not reach because it needs two lanes and a
cancel."""

import torch

from model.engine.denoising import DenoisingState
from model.engine.sequence import ActiveRow
from model.requests import GenerationParams, Request

MASK = 3


def row_in(table: DenoisingState, slot: int, key: str) -> ActiveRow:
    """Return a new row that has begun a block in the slot."""
    row = ActiveRow(Request(key, [7, 8], GenerationParams(block_size=4, steps_per_block=1)), 0, 0.0, slot=slot)
    table.enter(row)
    table.begin([row])
    return row


def test_what_comes_back_for_a_row_that_has_ended_changes_nothing_in_its_slot() -> None:
    """One of two rows in a forward is cancelled, and a new row takes its slot. The results of the forward leave the
    block of the new row all masked."""
    table = DenoisingState(2, MASK)
    gone, stays = row_in(table, 0, "gone"), row_in(table, 1, "stays")
    under_way = table.take([gone, stays])
    gone.ended = True
    newcomer = row_in(table, 0, "newcomer")
    ids = torch.arange(10, 18, dtype=torch.int32).view(2, 4)
    predicted = torch.stack([ids, torch.full((2, 4), 0.5).view(torch.int32)])
    seen = table.fill(under_way, predicted)
    assert [(block.row, block.tokens, block.steps) for block in seen] == [(stays, [14, 15, 16, 17], 1)]
    tokens, t = table.inputs(table.take([newcomer]))
    assert (tokens.tolist(), t.tolist()) == ([MASK] * 4, [1.0])
