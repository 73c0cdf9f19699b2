"""Tests of which rows a preview takes, and of the requests that it makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.requests import GenerationParams
from pipeline.core.types import WorkUnit
from pipeline.input.fetcher import Fetch
from pipeline.input.unit_reader import UnitData, UnitReader
from pipeline.preview import rows
from pipeline.preview.rows import PreviewRow, choose_rows
from tests.pipeline.cases import make_job, plan_of, write
from tests.workers.fakes import FakeEncoder


class CountingReader(UnitReader):
    """A reader that counts the rows that it reads."""

    read_rows = 0

    def read(self, unit: WorkUnit, fetch: Fetch | None = None) -> UnitData:
        self.read_rows += unit.row_count
        return super().read(unit, fetch)


def choose(folder: Path, wanted: int, room: int = 100, **settings: Any) -> tuple[list[PreviewRow], int]:
    """Return the chosen rows of the files in the folder, cut into units of 4 rows, and the number of rows read."""
    job = make_job(folder / "in", folder / "out", input=settings, output={"rows_per_file": 4})
    plan = plan_of(job)
    reader = CountingReader(job.input, plan.prompts)
    try:
        chosen = choose_rows(
            plan.units, reader, FakeEncoder(), GenerationParams(max_new_tokens=8), room=room, wanted=wanted
        )
    finally:
        reader.close()
    return chosen, reader.read_rows


def numbers(chosen: Sequence[PreviewRow]) -> list[tuple[int, bool]]:
    return [(shown.row.source_row, shown.request is not None) for shown in chosen]


def test_the_first_usable_rows_are_taken_in_input_order_with_the_unusable_ones_before_them(tmp_path: Path) -> None:
    """Rows of one unit after the other; the keys are those of the job, as they are part of the seed."""
    write(tmp_path / "in/a.parquet", prompt=["a", None, "b", "", "  ", "x" * 93, "c"])
    write(tmp_path / "in/b.parquet", prompt=["d", "e"])
    chosen, _ = choose(tmp_path, 4)
    assert [row for row, _ in numbers(chosen)] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert [shown.id for shown in chosen] == [shown.row.key for shown in chosen]
    assert [shown.request.key for shown in chosen if shown.request] == [
        "a.parquet#0",
        "a.parquet#2",
        "a.parquet#6",
        "b.parquet#0",
    ]
    assert [shown.row.error for shown in chosen if shown.request is None] == [
        "prompt is null",
        "prompt is empty",
        "the prompt has no tokens",
        "93 prompt tokens and max_new_tokens 8 exceed the limit of 100 tokens together; shorten the prompt or lower "
        "max_new_tokens",
    ]


def test_settings_and_ids_are_those_of_the_row(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["a", "b", "c"], n=[3, None, 0], name=["x", None, "z"])
    chosen, _ = choose(tmp_path, 3, id_column="name", row_settings={"max_new_tokens": "n"})
    assert [shown.id for shown in chosen] == ["x", None, "z"]
    assert [shown.request.params.max_new_tokens for shown in chosen if shown.request] == [3, 8]
    assert "column 'n': max_new_tokens is 0" in str(chosen[2].row.error)


def test_only_so_many_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the limit are not read even if none before them is usable, nor after enough usable ones."""
    write(tmp_path / "in/a.parquet", prompt=[None] * 60 + ["a"] * 60)
    assert choose(tmp_path, 2)[1] == 40
    chosen, read = choose(tmp_path, 3)
    assert (numbers(chosen)[0], len(chosen), read) == ((0, False), 60, 60)
    assert choose(tmp_path, 4)[1] == 64
    monkeypatch.setattr(rows, "READ_CHARS", 1)
    assert len(choose(tmp_path, 10)[0]) == 62
