"""Finds the positions of rows in a work unit. A row is known by its file and its number in the file."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.types import WorkUnit


def positions(unit: WorkUnit, rows: pa.Table | pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return the position in the unit, from 0, of each row of a table with `source_file` and `source_row`.

    It is -1 for a row that is not in the unit.
    """
    files: Any = rows["source_file"]
    encoded = (files.combine_chunks() if isinstance(files, pa.ChunkedArray) else files).dictionary_encode()
    pieces: dict[str | None, int] = {piece.name: number for number, piece in enumerate(unit.pieces)}
    # One more piece, without rows, stands for all files that are not in the unit, and for null.
    names = [pieces.get(name, len(pieces)) for name in encoded.dictionary.to_pylist()]
    number = np.array([*names, len(pieces)])[encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]
    first = np.array([*(piece.first_row for piece in unit.pieces), 0])[number]
    count = np.array([*(piece.row_count for piece in unit.pieces), 0])[number]
    start = np.array([*unit.starts, 0])[number]
    source_row: Any = rows["source_row"]
    found = np.asarray(source_row.fill_null(-1))
    return np.where((found >= first) & (found < first + count), start + found - first, -1)
