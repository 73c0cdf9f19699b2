"""Tests of fetching the small files of a unit ahead: order, limits, errors, and prompts made for many files at once."""

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.errors import InputError, StorageError
from pipeline.core.types import Piece, WorkUnit
from pipeline.input import fetcher, limits, unit_reader
from pipeline.input.fetcher import Fetch, Fetcher
from pipeline.input.parquet_rows import RowStream
from pipeline.input.unit_reader import UnitReader
from pipeline.prompts.prompts import PromptMaker
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, plan_of, prompts, reader_of, write
from tests.waiting import PATIENCE_S


class Data:
    """Stands for the bytes of a file; unlike bytes, it can be watched until it is gone."""


class Threads:
    """Stands for the threads that fetch: every fetch is done at once. `begun` has the names in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.made: list[weakref.ref[Data]] = []

    def submit(self, _call: Callable[[Piece], bytes], piece: Piece) -> "Future[Any]":
        self.begun.append(piece.name)
        future: Future[Any] = Future()
        future.set_result(data := Data())
        self.made.append(weakref.ref(data))
        return future


def unit_of_sizes(*sizes: int) -> WorkUnit:
    return WorkUnit("u", tuple(Piece(f"/in/{i}", f"{i}", 0, 1, size, "s") for i, size in enumerate(sizes)))


def fetch_of(unit: WorkUnit, memory: Fetcher | None = None) -> tuple[Fetch, Threads]:
    threads: Any = Threads()
    return Fetch(unit, threads, memory or Fetcher()), threads


def test_no_more_files_than_allowed_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching begins before anyone iterates, goes on while files are decoded, and is never too far ahead."""
    monkeypatch.setattr(fetcher, "AHEAD_FILES", 4)
    fetch, threads = fetch_of(unit_of_sizes(*[10] * 20))
    assert len(threads.begun) == 4
    for done, (piece, _) in enumerate(fetch, 1):
        assert piece.name == str(done - 1)
        assert len(threads.begun) == min(20, done + 4)


def test_no_more_bytes_than_allowed_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "AHEAD_BYTES", 100)
    sizes = [30, 60, 20, 90, 10, 10, 100, 1, 1]
    fetch, threads = fetch_of(unit_of_sizes(*sizes))
    done = 0
    for done, _ in enumerate(fetch, 1):
        begun = len(threads.begun)
        assert sum(sizes[done:begun]) <= 100
        assert begun == len(sizes) or sum(sizes[done : begun + 1]) > 100, "another file would have fitted"
    assert done == len(sizes)


def test_all_units_share_one_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit that is decoded goes on, one file at a time, while another one holds all the memory. A unit that is
    given up returns its share."""
    monkeypatch.setattr(fetcher, "AHEAD_BYTES", 100)
    memory = Fetcher()
    held, of_held = fetch_of(unit_of_sizes(50, 50, 50), memory)
    decoded, of_decoded = fetch_of(unit_of_sizes(*[10] * 8), memory)
    assert (len(of_held.begun), len(of_decoded.begun)) == (2, 0)
    pieces = iter(decoded)
    assert [next(pieces)[0].name for _ in range(3)] == ["0", "1", "2"]
    assert len(of_decoded.begun) == 3
    held.close()
    assert list(held) == []
    next(pieces)
    assert len(of_decoded.begun) == 8
    pieces.close()  # type: ignore[attr-defined]  # it is a generator
    last, of_last = fetch_of(unit_of_sizes(50, 50, 1), memory)
    assert len(of_last.begun) == 2, "all the memory is free again, and no more than that"
    last.close()


def test_bytes_are_released_after_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "AHEAD_FILES", 3)
    fetch, threads = fetch_of(unit_of_sizes(*[10] * 9))
    for done, (_, data) in enumerate(fetch, 1):
        assert data is not None
        alive = [number for number, made in enumerate(threads.made) if made() is not None]
        assert alive == list(range(done - 1, min(9, done + 3)))


def test_large_files_are_not_fetched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lower for a file with a unit of its own. A file of unknown size is not fetched whole either."""
    monkeypatch.setattr(fetcher, "WHOLE_BYTES", 50)
    monkeypatch.setattr(fetcher, "WHOLE_ALONE_BYTES", 20)
    fetch, threads = fetch_of(unit_of_sizes(10, 51, 50, -1))
    assert [data is not None for _, data in fetch] == [True, False, True, False]
    assert threads.begun == ["0", "2"]
    assert [[data is not None for _, data in fetch_of(unit_of_sizes(size))[0]] for size in (20, 21)] == [
        [True],
        [False],
    ]


def test_pieces_come_in_order_whichever_file_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    last_came = threading.Event()

    def fetch_whole(piece: Piece, _storage: Storage) -> bytes:
        if piece.name == "7":
            last_came.set()
        elif piece.name == "0":
            assert last_came.wait(PATIENCE_S)
        return piece.name.encode()

    monkeypatch.setattr(fetcher, "fetch_whole", fetch_whole)
    running = Fetcher()
    assert [data for _, data in running.fetch(unit_of_sizes(*[10] * 8))] == [b"%d" % i for i in range(8)]
    running.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Yield an event that the one thread that fetches waits for. File 1 cannot be read."""
    opened = threading.Event()

    def fetch_whole(piece: Piece, _storage: Storage) -> bytes:
        assert opened.wait(PATIENCE_S)
        if piece.name == "1":
            raise StorageError("cannot read 1")
        return piece.name.encode()

    monkeypatch.setattr(fetcher, "THREADS", 1)
    monkeypatch.setattr(fetcher, "fetch_whole", fetch_whole)
    yield opened
    opened.set()


def test_closing_does_not_wait_for_a_fetch(gate: threading.Event) -> None:
    """Files that no thread has begun with are given up; the one in progress still comes."""
    running = Fetcher()
    pieces = iter(running.fetch(unit_of_sizes(10, 10, 10)))
    running.close()
    gate.set()
    assert next(pieces)[1] == b"0"
    with pytest.raises(CancelledError):
        next(pieces)


def test_after_an_error_no_further_file_of_the_unit_is_fetched(gate: threading.Event) -> None:
    """The files of the next unit then do not wait behind them."""
    running = Fetcher()
    fetch = running.fetch(unit_of_sizes(*[10] * 40))
    waiting = [future for _, future in fetch._ahead if future is not None]
    pieces = iter(fetch)
    gate.set()
    next(pieces)
    with pytest.raises(StorageError, match="cannot read 1"):
        next(pieces)
    assert all(future.done() for future in waiting[-30:])
    assert [data for _, data in running.fetch(unit_of_sizes(10, -1))] == [b"0", None]
    running.close()


def remove(file: Path) -> None:
    file.unlink()


def rewrite(file: Path) -> None:
    write(file, prompt=prompts(50))


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [remove, rewrite, cut_off, empty])
def test_a_file_that_is_not_as_planned_is_named_as_without_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    """The text is the same as for a file that is not fetched. The reader then reads the next unit."""
    files = [write(tmp_path / f"in/{i}.parquet", prompt=prompts(2, i)) for i in range(6)]
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 6})
    first, second = plan_of(job).units
    reader = reader_of(job)
    harm(files[1])
    said = []
    for whole in (fetcher.WHOLE_BYTES, -1):
        monkeypatch.setattr(fetcher, "WHOLE_BYTES", whole)
        with pytest.raises(InputError) as raised:
            reader.read(first)
        said.append(str(raised.value))
        assert [row.key for row in reader.read(second).rows] == [f"{i}.parquet#{n}" for i in (3, 4, 5) for n in (0, 1)]
    assert said[0] == said[1]
    assert "1.parquet" in said[0]
    reader.close()


@pytest.mark.parametrize("whole", [fetcher.WHOLE_BYTES, -1])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    """It was no Parquet file when the job was planned by a listing alone; only its own rows are named."""
    monkeypatch.setattr(fetcher, "WHOLE_BYTES", whole)
    for i in range(3):
        write(tmp_path / f"in/{i}.parquet", prompt=prompts(2, i))
    job = make_job(tmp_path / "in", tmp_path / "out")
    (unit,) = plan_of(job).units
    broken = tmp_path / "in/1.parquet"
    broken.write_bytes(bytes(100))
    stat = Storage(str(tmp_path / "in")).stat("1.parquet")
    assert stat is not None
    pieces = list(unit.pieces)
    pieces[1] = replace(pieces[1], size=stat.size, stamp=stat.stamp)
    reader = reader_of(job)
    with pytest.raises(InputError, match=r"1\.parquet, rows 0 to 1: cannot be decoded: Parquet magic bytes not found"):
        reader.read(replace(unit, pieces=tuple(pieces)))
    reader.close()


def test_a_storage_failure_reaches_the_reader_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt at the unit works."""
    for i in range(3):
        write(tmp_path / f"in/{i}.parquet", prompt=prompts(2, i))
    reader, unit = read_unit(tmp_path)
    original = Storage.read_range

    def failing(self: Storage, name: str, start: int, end: int) -> bytes:
        if name == "1.parquet":
            raise StorageError("cannot read 1.parquet: reset by peer (tried 5 times)")
        return original(self, name, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read_range", failing)
        with pytest.raises(StorageError, match=r"^cannot read 1\.parquet: reset by peer \(tried 5 times\)$"):
            reader.read(unit)
    assert len(reader.read(unit).rows) == 6
    reader.close()


def test_an_open_large_file_stays_open_beside_fetched_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of small files between two units of a large one does not make the reader begin the large one again."""
    large = write(tmp_path / "in/large.parquet", prompt=prompts(20))
    for i in range(2):
        write(tmp_path / f"in/{i}.parquet", prompt=prompts(1, i))
    monkeypatch.setattr(fetcher, "WHOLE_ALONE_BYTES", 0)
    job = make_job(large.parent, tmp_path / "out", output={"rows_per_file": 10})
    by_pieces = sorted(plan_of(job).units, key=lambda unit: (len(unit.pieces), unit.pieces[0].first_row))
    opened: list[str] = []
    original = RowStream.__init__

    def counting(self: Any, piece: Piece, columns: list[str], data: bytes | None = None) -> None:
        opened.append(piece.name)
        original(self, piece, columns, data)

    monkeypatch.setattr(RowStream, "__init__", counting)
    reader, (head, tail, small) = reader_of(job), by_pieces
    rows = [row.prompt for unit in (head, small, tail) for row in reader.read(unit).rows]
    assert rows == [*prompts(10), *prompts(2), *prompts(10, 10)]
    assert opened == ["large.parquet", "0.parquet", "1.parquet"]
    reader.close()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of each call that makes prompts."""
    calls: list[int] = []
    original = PromptMaker.make

    def counting(self: PromptMaker, table: pa.Table) -> Any:
        calls.append(table.num_rows)
        return original(self, table)

    monkeypatch.setattr(PromptMaker, "make", counting)
    return calls


def read_unit(tmp_path: Path, **sections: dict[str, Any]) -> tuple[UnitReader, WorkUnit]:
    job = make_job(tmp_path / "in", tmp_path / "out", **sections)
    (unit,) = plan_of(job).units
    return reader_of(job), unit


def test_prompts_of_many_files_are_made_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is all null in some files has the type of the others. Each row keeps its own reason, whatever the
    files before it hold."""
    for i in range(9):
        note = pa.nulls(2) if i % 3 == 1 else pa.array([f"n{i}", None])
        write(tmp_path / f"in/{i}.parquet", prompt=[f"p{i}", "" if i == 4 else "x"], note=note)
    calls = count_calls(monkeypatch)
    reader, unit = read_unit(tmp_path, input={"carry": ["note"]})
    data = reader.read(unit)
    assert calls == [18]
    assert [row.index for row in data.rows] == list(range(18))
    assert [row.key for row in data.rows] == data.columns["id"].to_pylist()
    assert [row.key for row in data.rows] == [f"{i}.parquet#{n}" for i in range(9) for n in (0, 1)]
    assert [row.source_row for row in data.rows] == [0, 1] * 9
    assert [row.key for row in data.rows if row.error] == ["4.parquet#1"]
    assert data.columns["note"].to_pylist() == [v for i in range(9) for v in (None if i % 3 == 1 else f"n{i}", None)]
    reader.close()


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows and by bytes; a piece with more of either is a batch of its own."""
    for i, rows in enumerate([2, 2, 2, 9, 1, 1]):
        write(tmp_path / f"in/{i}.parquet", prompt=prompts(rows))
    write(tmp_path / "in/6.parquet", prompt=["x" * 5000])
    write(tmp_path / "in/7.parquet", prompt=["x"])
    calls = count_calls(monkeypatch)
    monkeypatch.setattr(unit_reader, "BATCH_ROWS", 4)
    monkeypatch.setattr(unit_reader, "BATCH_BYTES", 4000)
    reader, unit = read_unit(tmp_path)
    reader.read(unit)
    assert calls == [4, 2, 9, 2, 1, 1]
    reader.close()


@pytest.mark.parametrize("whole", [fetcher.WHOLE_BYTES, -1])
def test_cells_that_are_too_large_cost_their_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(fetcher, "WHOLE_BYTES", whole)
    monkeypatch.setattr(limits, "MAX_CELL_BYTES", 1000)
    for i in range(4):
        write(tmp_path / f"in/{i}.parquet", prompt=["short", "x" * 2000 if i == 2 else "y", "z"])
    reader, unit = read_unit(tmp_path)
    wrong = {row.key: row.error for row in reader.read(unit).rows if row.error}
    assert wrong.keys() == {"2.parquet#1"}
    assert "above the limit of 1000 for a cell" in str(wrong["2.parquet#1"])
    reader.close()


@pytest.mark.slow
def test_template_columns_of_other_types_in_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is rendered with the values of its own file: a number stays a number beside texts and nulls."""
    values: list[Any] = [pa.array([7]), pa.nulls(1), pa.array(["7"]), pa.array([8]), pa.array([9]), pa.nulls(1)]
    for i, value in enumerate(values):
        write(tmp_path / f"in/{i}.parquet", n=value, t=[f"t{i}"])
    calls = count_calls(monkeypatch)
    template = "{{ t }} {% if n is number %}{{ n + 1 }}{% elif n is string %}text{% else %}nothing{% endif %}"
    reader, unit = read_unit(tmp_path, input={"template": template})
    rows = reader.read(unit).rows
    assert [row.prompt for row in rows] == ["t0 8", "t1 nothing", "t2 text", "t3 9", "t4 10", "t5 nothing"]
    assert calls == [2, 1, 3]
    reader.close()
