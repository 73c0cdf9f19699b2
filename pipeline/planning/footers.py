"""Reads the footers of the input files in parallel: row groups, schema and sizes, never data."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import StorageError
from pipeline.input.limits import check_footer
from pipeline.planning.cost import prompt_bytes
from pipeline.planning.part_size import carried_bytes
from pipeline.storage.storage import FileInfo, Storage

FOOTER_THREADS = 16

NAMED_AT_MOST = 3


@dataclass(frozen=True, slots=True)
class Footer:
    groups: tuple[int, ...]
    """Number of rows in each row group."""
    schema: pa.Schema
    carried_bytes: float
    """Estimated bytes, in the output, of the columns that are copied there; 0 if no columns are measured."""
    prompt_bytes: tuple[int, ...]
    """Uncompressed bytes of the prompt columns in each row group."""


def read_footers(
    root: str, listing: list[FileInfo], measured: Sequence[str], prompts: Sequence[str]
) -> tuple[list[tuple[FileInfo, Footer]], list[tuple[str, str]]]:
    storage = Storage(root)

    def read(info: FileInfo) -> Footer | str:
        try:
            with storage.open(info.name, info.size) as source:
                parquet = pq.ParquetFile(source)
                # Fails if the schema holds a name that cannot be shown.
                parquet.schema_arrow.to_string(show_field_metadata=False, show_schema_metadata=False)
                groups = check_footer(parquet.metadata, info.size)
                carried = carried_bytes(parquet.metadata, measured, info.size)
                return Footer(groups, parquet.schema_arrow, carried, prompt_bytes(parquet.metadata, prompts))
        except StorageError as error:
            return str(error)
        except UnicodeDecodeError:
            return "has a column name that is not UTF-8: rename the column"
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            return "is empty (0 bytes)" if info.size == 0 else f"is not Parquet: {' '.join(str(error).split())}"

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        results = list(zip(listing, pool.map(read, listing), strict=True))
    good = [(info, footer) for info, footer in results if isinstance(footer, Footer)]
    bad = [(info.name, reason) for info, reason in results if isinstance(reason, str)]
    return good, bad


def name_unreadable(shown: str, total: int, unreadable: list[tuple[str, str]]) -> str:
    named = "; ".join(f"{name}: {reason}" for name, reason in unreadable[:NAMED_AT_MOST])
    more = len(unreadable) - NAMED_AT_MOST
    rest = f"; and {more} more" if more > 0 else ""
    return f"input {shown}: {len(unreadable)} of {total} file(s) cannot be read: {named}{rest}"
