"""Estimates which units take longest, from footers and settings, so that these units are handed out first.

Then the replicas of a job end at about the same time: a long unit that began last would keep one replica busy while all
others are idle. Only the order of the units depends on the estimate.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

import pyarrow.parquet as pq

from pipeline.config.job import InputSection
from pipeline.prompts.template import template_names

BYTES_A_TOKEN = 4
"""Bytes of prompt that count as much as one generated token. A prompt token is cheaper than a generated one, but longer
prompts have longer completions, and each generated token reads the prompt."""


def prompt_columns(settings: InputSection) -> tuple[str, ...]:
    """Return the names of the input columns that prompts are made of. For a template, these are all names that may be
    columns; whether they are is not known before the footers are read."""
    if settings.template is not None:
        names = template_names(settings.template)
        return tuple(sorted(names.free | names.row_keys))
    return (getattr(settings, settings.prompt_source),)


def prompt_bytes(metadata: pq.FileMetaData, columns: Collection[str]) -> tuple[int, ...]:
    """Return the uncompressed bytes of these columns together in each row group of a file, as its footer states them.

    A footer may be wrong; a negative size counts as 0.
    """
    chunks = chunks_of(metadata, columns)
    return tuple(sum(max(0, chunk.total_uncompressed_size) for chunk in group) for group in chunks)


def chunks_of(metadata: pq.FileMetaData, columns: Collection[str]) -> Iterator[list[pq.ColumnChunkMetaData]]:
    """Yield, for each row group of a file, the column chunks that hold these columns; a nested column has several.

    Only the first row group is searched for them, because the others have the same ones.
    """
    starts = tuple(f"{name}." for name in columns)
    leaves: list[int] | None = None
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if leaves is None:
            every = range(group.num_columns if starts else 0)
            leaves = [leaf for leaf in every if f"{group.column(leaf).path_in_schema}.".startswith(starts)]
        # The footer of a broken file may give a later group fewer chunks.
        yield [group.column(leaf) for leaf in leaves if leaf < group.num_columns]


class ExpectedWork:
    """The expected work of the rows of one input file, in generated tokens, to compare its units with others.

    A row counts max_new_tokens, and one token per BYTES_A_TOKEN bytes of its prompt. The bytes of a row group are
    assumed to be spread evenly over its rows.
    """

    def __init__(self, groups: Sequence[int], sizes: Sequence[int], max_new_tokens: int) -> None:
        """Take the file's number of rows in each row group (`groups`), and the result of prompt_bytes (`sizes`)."""
        self._rows, self._bytes = [0, *accumulate(groups)], [0, *accumulate(sizes)]
        self._max_new_tokens = max_new_tokens

    def of(self, first: int, count: int) -> float:
        """Return the expected work of `count` rows from row `first` of the file on."""
        size = self._before(first + count) - self._before(first)
        return count * self._max_new_tokens + size / BYTES_A_TOKEN

    def _before(self, row: int) -> float:
        group = bisect_right(self._rows, row) - 1
        if group == len(self._rows) - 1:
            return self._bytes[-1]
        first, end = self._rows[group : group + 2]
        before, after = self._bytes[group : group + 2]
        return before + (after - before) * (row - first) / (end - first)
