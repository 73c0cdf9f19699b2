"""Makes the input of the chaos suite, and the expected result of every row."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.requests import GenerationParams, Request
from pipeline.storage.storage import Storage
from tests.chaos.engine import EOS, KILLERS, MARK, MAX_TOKENS, TOO_LONG, Engine

ROW_GROUP = 2_000
BAD_ONE_IN, KILLS_ONE_IN = 1_000, 10_000
BAD: tuple[bytes | None, ...] = (None, b"", b"not \xff UTF-8", b"x" * (TOO_LONG + 1))
"""Prompts that cannot be used, so that their rows become error rows."""
COLUMNS = ["completion", "finish_reason", "completion_tokens", "denoiser_forwards", "steps_per_block"]
"""The columns that faults must not change; times, attempts and replicas may change."""
ERROR: tuple[object, ...] = (None, "error", 0, 0, [])
"""The COLUMNS of an error row."""
SMALL = (1, 1, 5, 1)
"""The numbers of rows of the small files, again and again."""
FOLDERS = ("", "a/", "b/c/")
"""The folders of the files, one after the other."""
SAME_ROW = 3
"""The number in their files of two rows that end their processes."""
UPLOADS = 8
"""The number of files that are uploaded at the same time."""
PARAMS = GenerationParams(max_new_tokens=MAX_TOKENS, eos_ids=(EOS,))


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one input file."""

    name: str
    cells: Sequence[bytes | None]

    def parquet(self, **options: Any) -> bytes:
        """Return the bytes of the Parquet file. Bytes that are not UTF-8 are written as text all the same. `options`:
        further arguments of pyarrow's write_table."""
        column = pa.array(self.cells, pa.binary()).view(pa.string())
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": column}), sink, row_group_size=ROW_GROUP, **options)
        return sink.getvalue()


def make_prompts(rows: int, files: int, seed: int, killers: int | None = None, small: int = 0) -> list[Prompts]:
    """Return the prompts of an input with `rows` rows, in the order of its listing. `seed` determines them.

    `small` of the rows are in files of the sizes SMALL, and the others in `files` large files between them; all lie in
    FOLDERS. Some of the rows are bad (one in BAD_ONE_IN, at least one of each kind), and `killers` rows end the process
    that generates them; None: one in KILLS_ONE_IN, at least two. If there are small files, two of the killers are rows
    of the same number in two of them that are near each other in the listing.
    """
    killers = max(2, rows // KILLS_ONE_IN) if killers is None else killers
    rng = Random(seed)
    cells: list[bytes | None] = [
        f"row {number} ".encode() + bytes(rng.choices(b"abcdefgh ", k=int(rng.paretovariate(1.2) * 8) % 290))
        for number in range(rows)
    ]
    names = _names(rows, files, small)
    starts = dict(zip(names, accumulate(names.values(), initial=0), strict=False))
    pair = [starts[name] + SAME_ROW for name, size in names.items() if size == max(SMALL)][:2] if small else []
    chosen = pair[:killers]
    others = [row for row in range(rows) if row not in chosen]
    special = chosen + rng.sample(others, max(len(BAD), rows // BAD_ONE_IN) + killers - len(chosen))
    for count, row in enumerate(special):
        kill = f"{MARK}{KILLERS[count % len(KILLERS)]} in row {row}".encode()
        cells[row] = kill if count < killers else BAD[count % len(BAD)]
    return [Prompts(name, cells[starts[name] : starts[name] + size]) for name, size in names.items()]


def _names(rows: int, files: int, small: int) -> dict[str, int]:
    """Return the number of rows by name of the files of make_prompts, sorted by name."""
    sizes: list[int] = []
    while (left := small - sum(sizes)) > 0:
        sizes.append(min(left, SMALL[len(sizes) % len(SMALL)]))
    share = -(-(rows - small) // files)
    every = len(sizes) // files
    for number in range(files):  # evenly between the small files
        sizes.insert(number * (every + 1) + every // 2, min(share, rows - small - number * share))
    folders = FOLDERS if small else ("",)
    return dict(
        sorted((f"{folders[number % len(folders)]}{number:05}.parquet", size) for number, size in enumerate(sizes))
    )


def upload(storage: Storage, prompts: Sequence[Prompts], **options: Any) -> None:
    """Write the files to the storage. `options`: see Prompts.parquet."""
    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(lambda file: storage.write(file.name, file.parquet(**options)), prompts))


def expected(prompts: Sequence[Prompts]) -> dict[str, tuple[object, ...]]:
    """Return the COLUMNS of each row by its key, as the same engine makes them without Ray and without faults."""
    rows: dict[str, tuple[object, ...]] = {}
    requests = []
    for file in prompts:
        for number, cell in enumerate(file.cells):
            key = f"{file.name}#{number}"
            rows[key] = ERROR
            if cell is not None and cell not in BAD and not cell.startswith(MARK.encode()):
                requests.append(Request(key, list(cell), PARAMS))
    for done in Engine().generate(requests):
        steps = list(done.steps_per_block)
        rows[done.key] = done.text, done.finish_reason, len(done.token_ids), done.denoiser_forwards, steps
    return rows
