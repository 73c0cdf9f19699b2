"""Lets the S3 server refuse everything for a while, or answer reads of the input with wrong bytes."""

import re
import time

import pyarrow as pa
import pyarrow.parquet as pq

from tests.chaos.scenarios.record import Record
from tests.chaos.scenarios.trial import Trial

REFUSED_S, LONG_REFUSED_S = 4.0, 20.0
"""The seconds for which the server refuses everything, in short and in long scenarios."""
FLIPS, LONG_FLIPS = 6, 24
"""The number of wrong answers to reads of the input, in short and in long scenarios."""
SPARED = 0.5
"""The share of answers that are right while others are wrong."""
HEADER_BYTES = 64
"""The most bytes of the header of a data page without statistics, which its checksum does not cover."""
CHECKED = {"write_page_checksum": True, "use_dictionary": False, "write_statistics": False}
"""The options of pyarrow for input files with one data page with a checksum in each row group."""


def refused(trial: Trial) -> Record:
    """Fault: in the middle of a run, the server answers 403 to every request for a while, as while a role or a clock is
    wrong. Promise: the run waits, for reads as well as for writes, and completes."""
    assert trial.place.proxy is not None
    trial.job["output"]["path"] = f"{trial.place.bucket}/out"
    driver = trial.submit_until(trial.rows_end)
    trial.place.proxy.fail_at_random(trial.place.seed, 1.0, ("denied",))
    try:
        time.sleep(LONG_REFUSED_S if trial.place.long else REFUSED_S)
    finally:
        trial.place.proxy.fail_at_random(0, 0.0)
    trial.promise(driver.wait() == 0, f"the run did not wait for the server: {driver.tail()}")
    return trial.finish()


def input_flips(trial: Trial) -> Record:
    """Fault: for a while, answers to reads of the input have one wrong bit in the data of their pages, which have
    checksums. Promise: all rows are right in the end."""
    assert trial.place.proxy is not None
    flips = _Flips(trial)
    trial.place.proxy.spoil = flips
    try:
        code = trial.run().poll()
    finally:
        trial.place.proxy.spoil = None
    trial.promise(flips.left == 0, f"{flips.left} of the wrong answers were never asked for: {trial.runs[-1].tail()}")
    trial.promise(code == 0, f"the run did not read again: {trial.runs[-1].tail()}")
    return trial.finish()


class _Flips:
    """Changes one bit in some answers to reads of the input, once the replica has begun: a checksum guards pages, but
    nothing guards the footers that a plan is made of."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._data = {file.name: _pages(file.parquet(**trial.options)) for file in trial.prompts}
        self.left = LONG_FLIPS if trial.place.long else FLIPS

    def __call__(self, path: str, range_header: str, content: bytes) -> bytes:
        name = path.rpartition("/in/")[2]
        if name not in self._data or not self.left or not any(self._trial.logs.iterdir()):
            return content
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", range_header)) else 0
        spans = [(max(first, start), min(end, start + len(content))) for first, end in self._data[name]]
        inside = [(first, end) for first, end in spans if first < end]
        rng = self._trial.rng
        if not inside or rng.random() < SPARED:
            return content
        self.left -= 1
        changed = bytearray(content)
        changed[rng.randrange(*rng.choice(inside)) - start] ^= 1 << rng.randrange(8)
        return bytes(changed)


def _pages(data: bytes) -> list[tuple[int, int]]:
    """Return (first byte, end) of the data of each page in a file that was written with CHECKED."""
    footer = pq.read_metadata(pa.BufferReader(data))
    columns = [footer.row_group(group).column(0) for group in range(footer.num_row_groups)]
    return [
        (column.data_page_offset + HEADER_BYTES, column.data_page_offset + column.total_compressed_size)
        for column in columns
    ]
