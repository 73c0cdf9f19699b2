"""Reads the footers of the input files in parallel: row groups, schema and sizes, never data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import StorageError
from pipeline.core.text import counted, one_line
from pipeline.input.limits import check_footer
from pipeline.planning.cost import prompt_bytes
from pipeline.planning.part_size import carried_bytes
from pipeline.storage.parallel import call_each
from pipeline.storage.storage import FileInfo, Storage

FOOTER_THREADS = 32
"""The number of footers that are read at the same time: as many as the storage keeps connections."""
NAMED_AT_MOST = 3
"""The most unreadable files that an error message names."""


@dataclass(frozen=True, slots=True)
class Footer:
    """The facts from the footer of one input file that a plan is made of."""

    groups: tuple[int, ...]
    """The number of rows in each row group."""
    schema: pa.Schema
    """The Arrow schema of the file without its metadata. Files with the same schema share one object (see distinct)."""
    carried_bytes: float
    """The estimated bytes that the measured columns of all rows take in the output; 0 if none are measured."""
    prompt_bytes: tuple[int, ...]
    """The uncompressed bytes of the prompt columns in each row group."""


def read_footers(
    root: str, listing: list[FileInfo], measured: Sequence[str], prompts: Sequence[str]
) -> tuple[list[tuple[FileInfo, Footer]], list[tuple[str, str]]]:
    """Read the footers of all files of a listing below `root`, in parallel and in the order of the listing.

    Returns the readable files with their footers, and (name, reason) of each file that cannot be read. `measured`: the
    columns for Footer.carried_bytes. `prompts`: the columns for Footer.prompt_bytes.
    """
    storage = Storage(root)
    schemas: dict[bytes, pa.Schema] = {}

    def read(info: FileInfo) -> Footer | str:
        footer = read_once(info)
        if isinstance(footer, str) and info.size > 0:
            # Its bytes may have been damaged on their way here, and the checksums of Parquet do not cover the footer.
            return read_once(info)
        return footer

    def read_once(info: FileInfo) -> Footer | str:
        try:
            with storage.open(info.name, info.size) as source:
                parquet = pq.ParquetFile(source)
                metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
            # Fails if the schema holds a name that cannot be shown.
            schema.to_string(show_field_metadata=False)
            groups = check_footer(metadata, info.size)
            carried = carried_bytes(metadata, measured, info.size)
            sizes = prompt_bytes(metadata, prompts)
            return Footer(groups, schemas.setdefault(schema.serialize().to_pybytes(), schema), carried, sizes)
        except StorageError as error:
            return str(error)
        except UnicodeDecodeError:
            return "has a column name that is not UTF-8: rename the column"
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            return "is empty (0 bytes)" if info.size == 0 else f"is not Parquet: {one_line(error)}"

    results = list(zip(listing, call_each(read, listing, FOOTER_THREADS), strict=True))
    good = [(info, footer) for info, footer in results if isinstance(footer, Footer)]
    bad = [(info.name, reason) for info, reason in results if isinstance(reason, str)]
    return good, bad


def distinct(footers: Iterable[tuple[FileInfo, Footer]]) -> Iterator[tuple[FileInfo, Footer]]:
    """Yield the first of the files with each schema, in the order of the files.

    A check of columns that passes for these files passes for all, and a check that fails names the same file.
    """
    seen: set[int] = set()
    for info, footer in footers:
        if id(footer.schema) not in seen:
            seen.add(id(footer.schema))
            yield info, footer


def name_unreadable(shown: str, total: int, unreadable: list[tuple[str, str]]) -> str:
    """Return the error message about unreadable input files, which names the first NAMED_AT_MOST with their reasons.

    `shown`: the input path as messages show it. `total`: the number of all input files.
    """
    named = "; ".join(f"{name}: {reason}" for name, reason in unreadable[:NAMED_AT_MOST])
    more = len(unreadable) - NAMED_AT_MOST
    rest = f"; and {more} more" if more > 0 else ""
    return f"input {shown}: {len(unreadable)} of {counted(total, 'file')} cannot be read: {named}{rest}"
