"""Chooses the rows of a preview: the first rows of the input, with their prompts as `run` makes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from model.requests import GenerationParams, Request
from pipeline.core.types import Row, WorkUnit
from pipeline.input.row_settings import with_settings
from pipeline.input.unit_reader import UnitReader
from pipeline.prompts.encoder import EncoderLike

READ_FOR_EACH = 20
"""Maximum number of rows that are read for each row that is wanted: the first rows may all be unusable."""
READ_CHARS = 64 << 20
"""Number of characters of prompts after which no further rows are read, to limit the memory."""


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A row of the input that a preview shows: with the request that the engine gets, or with the reason why there is
    none."""

    row: Row
    """The row with its prompt. An unusable one has the reason in `row.error` and no prompt."""
    id: str | None
    """The id that the row has in the output, as text; None if it is null."""
    request: Request | None = None
    """The request for the engine; None if the row cannot be generated."""


def choose_rows(
    units: Sequence[WorkUnit],
    reader: UnitReader,
    encoder: EncoderLike,
    params: GenerationParams,
    *,
    room: int,
    wanted: int,
) -> list[PreviewRow]:
    """Return the first rows of the input, up to the `wanted`-th one that can be generated. Unusable rows among them are
    included.

    At most READ_FOR_EACH x `wanted` rows are read, so there may be fewer rows that can be generated, or none. `params`:
    the job's generation settings. `room`: maximum number of tokens of a prompt and its completion together. Raises
    InputError and StorageError as UnitReader.read does.
    """
    chosen: list[PreviewRow] = []
    usable = characters = 0
    for piece in _pieces(units, wanted):
        data = reader.read(piece)
        ids = data.columns["id"]
        for row, tokens in zip(data.rows, encoder.encode(data.rows), strict=True):
            row_id = ids[row.index].as_py()
            found = _with_request(row, None if row_id is None else str(row_id), tokens, params, room)
            chosen.append(found)
            usable += found.request is not None
            characters += len(found.row.prompt or "")
            if usable == wanted or characters > READ_CHARS:
                return chosen
    return chosen


def _pieces(units: Sequence[WorkUnit], wanted: int) -> Iterator[WorkUnit]:
    """Yield the first READ_FOR_EACH x `wanted` rows of the units in pieces of at most `wanted` rows, in their order."""
    left = READ_FOR_EACH * wanted
    for unit in units:
        done = 0
        while left and done < unit.row_count:
            count = min(wanted, left, unit.row_count - done)
            yield unit.part(done, done + count)
            done, left = done + count, left - count


def _with_request(
    row: Row, row_id: str | None, tokens: Sequence[int], params: GenerationParams, room: int
) -> PreviewRow:
    if row.prompt is None:
        return PreviewRow(row, row_id)
    own = with_settings(params, row.settings)
    reason = None
    if not tokens:
        reason = "the prompt has no tokens"
    elif len(tokens) + own.max_new_tokens > room:
        reason = (
            f"{len(tokens):,} prompt tokens and max_new_tokens {own.max_new_tokens:,} exceed the limit of {room:,} "
            "tokens together; shorten the prompt or lower max_new_tokens"
        )
    if reason is not None:
        return PreviewRow(replace(row, prompt=None, control=(), error=reason), row_id)
    return PreviewRow(row, row_id, Request(row.key, tokens, own))
