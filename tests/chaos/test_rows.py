"""Tests that the input of the chaos suite has the mix of files and units that the suite is about."""

import pytest

from pipeline.core.types import WorkUnit
from pipeline.storage.storage import Storage
from tests.chaos.engine import MARK
from tests.chaos.harness import make_job
from tests.chaos.rows import BAD, SMALL, Prompts, make_prompts, upload
from tests.chaos.test_chaos import FILES, ROWS, SCHEDULE
from tests.chaos.test_chaos import SMALL as SMALL_ROWS
from tests.pipeline.cases import plan_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts() -> list[Prompts]:
    return make_prompts(ROWS, FILES, seed=0, small=SMALL_ROWS)


@pytest.fixture(scope="module")
def units(prompts: list[Prompts], tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkUnit, ...]:
    """Return the units of the short suite."""
    folder = tmp_path_factory.mktemp("chaos")
    upload(Storage(str(folder / "in")), prompts)
    return plan_of(make_job(str(folder / "in"), str(folder / "out"), SCHEDULE)).units


def killers(prompts: list[Prompts]) -> list[tuple[str, int]]:
    """Return the file and the number of each row that ends its process."""
    mark = MARK.encode()
    return [
        (file.name, number)
        for file in prompts
        for number, cell in enumerate(file.cells)
        if (cell or b"").startswith(mark)
    ]


def test_there_are_small_and_large_files_in_three_folders(prompts: list[Prompts]) -> None:
    assert [file.name for file in prompts] == sorted(file.name for file in prompts)
    assert sum(len(file.cells) for file in prompts) == ROWS
    sizes = {len(file.cells) for file in prompts}
    assert sizes == {*SMALL, ROWS - SMALL_ROWS}
    assert {file.name.rpartition("/")[0] for file in prompts} == {"", "a", "b/c"}


def test_units_have_one_piece_or_files_of_several_sizes(units: tuple[WorkUnit, ...]) -> None:
    large = max(units, key=lambda unit: unit.pieces[0].size).pieces[0].name
    single = [unit for unit in units if unit.pieces[0].name == large]
    packed = [unit for unit in units if unit not in single]
    assert {len(unit.pieces) for unit in single} == {1}
    assert len(single) == (ROWS - SMALL_ROWS) // SCHEDULE.rows_per_file
    assert len(packed) >= SMALL_ROWS // SCHEDULE.rows_per_file
    assert all({piece.row_count for piece in unit.pieces} == set(SMALL) for unit in packed[:-1])
    assert any(len({piece.name.rpartition("/")[0] for piece in unit.pieces}) > 1 for unit in packed)


def test_two_rows_of_the_same_number_end_the_process_in_one_unit(
    prompts: list[Prompts], units: tuple[WorkUnit, ...]
) -> None:
    """A range of the unit that is told by row numbers in files, and not by positions in the unit, would hold both."""
    (file, number), (other, same) = killers(prompts)
    assert (file != other, number) == (True, same)
    [unit] = [unit for unit in units if file in {piece.name for piece in unit.pieces}]
    assert other in {piece.name for piece in unit.pieces}


def test_input_of_large_files_has_bad_rows_of_each_kind() -> None:
    prompts = make_prompts(2_000, 2, seed=1, killers=0)
    assert [len(file.cells) for file in prompts] == [1_000, 1_000]
    assert killers(prompts) == []
    assert {cell for file in prompts for cell in file.cells} >= set(BAD)
