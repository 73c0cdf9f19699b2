"""Tests of work units over several files: every row is in one unit, the limits hold, and stored units never change."""

import itertools
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.job import Job
from pipeline.core.types import WorkUnit
from pipeline.output.job_records import from_lines, to_lines
from pipeline.planning.fingerprint import Listing
from pipeline.planning.footers import Footer
from pipeline.planning.packing import MAX_BYTES, MAX_PIECES, Packing, StoredUnits, cut, make_units, spans_of, unit_id
from pipeline.planning.part_size import part_bytes, rows_per_unit
from pipeline.storage.storage import FileInfo
from tests.pipeline.cases import make_job, open_ledger, plan_of, prompts, write

SCHEMA = pa.schema([("prompt", pa.string())])
Files = list[tuple[FileInfo, Footer]]

FILES = st.dictionaries(
    st.text("abz/", min_size=1, max_size=3), st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=25
)
"""Files: the number of rows in each row group, by name."""


def footers_of(files: dict[str, list[int]], carried: float = 0.0) -> Files:
    """Return what a plan reads of these files, in the order of a listing."""
    return [
        (FileInfo(name, f"/in/{name}", 100, "mtime:1"), Footer(tuple(groups), SCHEMA, carried, (8,) * len(groups)))
        for name, groups in sorted(files.items())
    ]


def job_with(**output: object) -> Job:
    return make_job("/in", "/out", output=output, generation={"max_new_tokens": 40})


def listing_of(files: Files) -> Listing:
    return {info.name: (info.size, info.stamp, sum(footer.groups)) for info, footer in files}


def stored_by(units: list[WorkUnit], files: Files) -> StoredUnits:
    """Return the units as plan.json gives them at the next start."""
    places = {info.name: (number, sum(footer.groups)) for number, (info, footer) in enumerate(files)}
    rows = [(info.name, sum(footer.groups)) for info, footer in files]
    return StoredUnits(packing=from_lines(to_lines(units, places), rows), listing=listing_of(files))


def rows_of(packing: Packing) -> list[tuple[str, int]]:
    return [(span.file, span.first_row + row) for unit in packing for span in unit for row in range(span.rows)]


@given(files=FILES, limit=st.integers(1, 30))
def test_every_row_is_in_one_unit_within_the_limit_and_large_files_are_cut_as_before(
    files: dict[str, list[int]], limit: int
) -> None:
    footers = footers_of(files)
    units = list(make_units(job_with(rows_per_file=limit), footers, StoredUnits()))
    rows = rows_of([spans_of(unit) for unit in units])
    assert sorted(rows) == sorted((name, row) for name, groups in files.items() for row in range(sum(groups)))
    assert len(set(rows)) == len(rows)
    assert all(1 <= unit.row_count <= limit for unit in units)
    assert len({unit.id for unit in units}) == len(units)
    alone = defaultdict[str, list[tuple[int, int]]](list)
    for unit in units:
        names = [piece.name for piece in unit.pieces]
        assert names == sorted(names)
        assert unit.id == unit_id(unit.pieces[0].name, unit.pieces[0].first_row)
        alone[names[0]].append((unit.pieces[0].first_row, unit.row_count))
    for name, groups in files.items():
        if sum(groups) > limit:
            assert alone[name] == list(cut(groups, limit))


@given(files=FILES, limit=st.integers(1, 30))
def test_small_files_fill_units_as_far_as_their_order_allows(files: dict[str, list[int]], limit: int) -> None:
    """The rows of a unit and the first file of the next one would be too many together."""
    units = list(make_units(job_with(rows_per_file=limit), footers_of(files), StoredUnits()))
    small = [unit for unit in units if unit.pieces[0].row_count == sum(files[unit.pieces[0].name])]
    for unit, following in itertools.pairwise(small):
        assert unit.row_count + following.pieces[0].row_count > limit


@settings(max_examples=50)
@given(files=FILES, target=st.floats(0.00001, 0.01), carried=st.floats(0, 3000))
def test_a_size_in_megabytes_limits_the_estimated_bytes(
    files: dict[str, list[int]], target: float, carried: float
) -> None:
    job, footers = job_with(target_mb=target), footers_of(files, carried)
    for unit in make_units(job, footers, StoredUnits()):
        if len(unit.pieces) > 1:
            assert sum(part_bytes(job, piece.row_count, carried) for piece in unit.pieces) <= target * 1e6
        else:
            piece = unit.pieces[0]
            assert piece.row_count <= rows_per_unit(job, sum(files[piece.name]), carried)


def test_a_unit_has_a_limited_number_of_pieces() -> None:
    files = {f"{number:05}": [1] for number in range(2 * MAX_PIECES + 1)}
    units = list(make_units(job_with(rows_per_file=10**6), footers_of(files), StoredUnits()))
    assert [len(unit.pieces) for unit in units] == [MAX_PIECES, MAX_PIECES, 1]


def test_a_unit_has_a_limited_number_of_bytes() -> None:
    """Files with few but large rows would otherwise make units that no replica can hold, although each file fits."""
    third = MAX_BYTES // 3
    files = [
        (replace(info, size=size), replace(footer, prompt_bytes=(prompt_bytes,)))
        for (info, footer), (size, prompt_bytes) in zip(
            footers_of({f"{number}": [1] for number in range(8)}),
            [(third, 0), (third, 0), (0, third), (0, third), (1, 0), (2 * MAX_BYTES, MAX_BYTES), (1, 1), (1, 1)],
            strict=True,
        )
    ]
    units = list(make_units(job_with(rows_per_file=100), files, StoredUnits()))
    assert [[piece.name for piece in unit.pieces] for unit in units] == [["0", "1", "2"], ["3", "4"], ["5"], ["6", "7"]]


@given(steps=st.lists(FILES, min_size=2, max_size=4), limit=st.integers(1, 30))
def test_old_units_stay_as_they_are_whatever_is_added(steps: list[dict[str, list[int]]], limit: int) -> None:
    job, files = job_with(rows_per_file=limit), dict[str, list[int]]()
    before: list[WorkUnit] = []
    stored = StoredUnits()
    for added in steps:
        files = {**added, **files}  # a file that is there already stays
        footers = footers_of(files)
        units = list(make_units(job, footers, stored))
        assert units[: len(before)] == before
        assert sorted(rows_of([spans_of(unit) for unit in units])) == sorted(
            (name, row) for name, groups in files.items() for row in range(sum(groups))
        )
        before, stored = units, stored_by(units, footers)


@given(files=FILES, limit=st.integers(1, 30), changed=st.data())
def test_units_with_a_changed_file_are_packed_again(
    files: dict[str, list[int]], limit: int, changed: st.DataObject
) -> None:
    """This matters only before the first row is saved; after that the change is refused."""
    job, footers = job_with(rows_per_file=limit), footers_of(files)
    units = list(make_units(job, footers, StoredUnits()))
    name = changed.draw(st.sampled_from(sorted(files)))
    after = {**files, name: [*files[name], 1]}
    again = list(make_units(job, footers_of(after), stored_by(units, footers)))
    assert sorted(rows_of([spans_of(unit) for unit in again])) == sorted(
        (name, row) for name, groups in after.items() for row in range(sum(groups))
    )
    untouched = [unit for unit in units if name not in {piece.name for piece in unit.pieces}]
    assert again[: len(untouched)] == untouched


def test_units_of_version_1_have_rows_of_one_file() -> None:
    files = {"a": [1], "b": [2, 2], "c": [1]}
    units = list(make_units(job_with(rows_per_file=3), footers_of(files), StoredUnits(rules=1)))
    assert [spans_of(unit) for unit in units] == [(("a", 0, 1),), (("b", 0, 2),), (("b", 2, 2),), (("c", 0, 1),)]
    assert {unit.rules for unit in units} == {1}


def test_lines_name_runs_of_whole_files_and_ranges_of_rows() -> None:
    files = {"a": [1], "b": [1], "c": [], "d": [7], "e": [2], "f": [3]}
    footers = footers_of(files)
    places = {info.name: (number, sum(footer.groups)) for number, (info, footer) in enumerate(footers)}
    units = list(make_units(job_with(rows_per_file=6), footers, StoredUnits()))
    assert to_lines(units, places) == ["3:0+3", "3:3+4", "0-1 4", "5"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["0-1", "2:0+4"], "do not hold each row of c once"),
        (["0-1", "2:0+4", "2:3+2"], "do not hold each row of c once"),
        (["0-1", "2:1+4"], "do not hold each row of c once"),
        (["0-1", "2:0+6"], "do not hold each row of c once"),
        (["0-1", "2", "0"], "do not hold each row of a once"),
        (["1-0", "2"], "do not hold each row of a once"),
        (["0-3"], "its unit '0-3' cannot be read"),
        (["0-1", "2:-1+6"], "its unit '2:-1+6' cannot be read"),
        (["", "0-2"], "its unit '' cannot be read"),
        (["0  1 2"], "cannot be read"),
        (["0-2", "2-1"], "its unit '2-1' has no rows of a file"),
        (["0-2", "2:0+0"], "its unit '2:0+0' has no rows of a file"),
        (["0-1 2:3+2 2:0+3"], "or names a file twice"),
    ],
)
def test_lines_that_do_not_hold_each_row_once_are_refused(lines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        from_lines(lines, [("a", 1), ("b", 2), ("c", 5)])


def test_plan_json_keeps_the_units_of_each_extension(tmp_path: Path) -> None:
    for name in ("b", "d", "f"):
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(2))
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 4}, input={"on_change": "extend"})
    before = plan_of(job)
    open_ledger(job, before)
    assert [spans_of(unit) for unit in before.units] == [
        (("b.parquet", 0, 2), ("d.parquet", 0, 2)),
        (("f.parquet", 0, 2),),
    ]
    for name in ("a", "c", "e"):
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(2))
    after = plan_of(job)
    open_ledger(job, after)
    assert after.units[:2] == before.units
    assert [spans_of(unit) for unit in after.units[2:]] == [
        (("a.parquet", 0, 2), ("c.parquet", 0, 2)),
        (("e.parquet", 0, 2),),
    ]
    assert plan_of(job).units == after.units


def test_other_settings_pack_anew(tmp_path: Path) -> None:
    """As long as no row is saved, a job may be changed, and its units follow its settings."""
    for name in ("a", "b"):
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(2))
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 2})
    open_ledger(job, plan_of(job))
    wider = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 4})
    assert [len(unit.pieces) for unit in plan_of(wider).units] == [2]
