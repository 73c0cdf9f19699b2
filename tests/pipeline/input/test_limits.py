"""Tests of Parquet files from strangers: footers that cannot be true, bombs, and cells and units that are too large."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import InputError
from pipeline.input import limits
from pipeline.planning import plan
from pipeline.prompts.values import Outcome, Prompt
from tests import memory
from tests.pipeline.cases import make_job, plan_of, prompts, reader_of, write
from tests.pipeline.input.footers import footer_file

ROOT = Path(__file__).parents[3]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and /proc are Linux's")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (footer_file(groups=(2**60,)), f"its footer promises {2**60} rows in "),
        (footer_file(groups=(2**40,) * 50), f"its footer promises {50 * 2**40} rows in "),
        (footer_file(groups=(-5,)), "its footer promises -5 rows but row groups of -5"),
        (footer_file(groups=(5, -5), rows=0), "its footer promises 0 rows but row groups of 0"),
        (footer_file(groups=(5,), rows=7), "its footer promises 7 rows but row groups of 5"),
        (footer_file(columns=20_001), "it has 20001 columns, above the limit of 20000"),
        (footer_file(depth=50_000), "too deeply nested"),
    ],
)
def test_footers_that_cannot_be_true(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        plan_of(make_job(file, tmp_path / "out", input={"prompt_column": "c0"}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absurd_numbers_of_units_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_UNITS", 10)
    file = write(tmp_path / "a.parquet", prompt=prompts(11))
    with pytest.raises(InputError, match=r"makes more than 10 units: raise output\.rows_per_file"):
        plan_of(make_job(file, tmp_path / "out", output={"rows_per_file": 1}))
    assert len(plan_of(make_job(file, tmp_path / "out", output={"rows_per_file": 2})).units) == 6


@pytest.mark.slow
def test_thousands_of_columns_and_empty_groups(tmp_path: Path) -> None:
    columns: dict[str, Any] = {f"c{i}": [i] for i in range(3000)}
    write(tmp_path / "a.parquet", prompt=["x"], **columns)
    writer = pq.ParquetWriter(tmp_path / "b.parquet", pa.schema([("prompt", pa.string())]))
    for rows in ([], ["y"], [], [], ["z"], []):
        writer.write_table(pa.table({"prompt": pa.array(rows, pa.string())}))
    writer.close()
    job = make_job(tmp_path / "*.parquet", tmp_path / "out")
    reader = reader_of(job)
    assert [row.prompt for unit in plan_of(job).units for row in reader.read(unit).rows] == ["x", "y", "z"]
    reader.close()


BOMB_PROBE = """
import resource, sys
from collections.abc import Iterator
from pathlib import Path
from pipeline.input import limits
from pipeline.core.errors import InputError
from pipeline.planning.plan import make_plan
from tests.pipeline.cases import make_job, reader_of

limits.UNIT_BYTES, limits.BATCH_BYTES = 1 << 28, 1 << 27
job = make_job(sys.argv[1], sys.argv[2], input={"carry": ["carried"]})
reader = reader_of(job)
(unit,) = make_plan(job, checkpoint_identity="x").units
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30),) * 2)
try:
    reader.read(unit)
except InputError as error:
    print(error)
"""


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("kind", ["dictionary", "list", "plain", "late"])
def test_a_bomb_of_a_few_kilobytes_is_refused_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    """The small file holds 0.4 to 40 GB of text. With 1 GiB of memory to spare, the reader comes to its own limit
    first."""
    rows, big = 4_000, "x" * 10_000_000
    text: Any = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([big]))
    if kind == "list":
        text = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), text)
    if kind == "late":  # the first batches do not show how large the later ones are
        text = pa.DictionaryArray.from_arrays(pa.array([1] * 2000 + [0] * 2000, pa.int32()), pa.array([big, "x"]))
    if kind == "plain":
        text = pa.array(["x" * 1_000_000] * 400)
    file = tmp_path / "bomb.parquet"
    options = {"use_dictionary": False} if kind == "plain" else {"dictionary_pagesize_limit": 1 << 30}
    table = pa.table({"prompt": ["p"] * len(text), "carried": text})
    pq.write_table(table, file, compression="zstd", **options)
    assert file.stat().st_size < 150_000
    probe = [sys.executable, "-c", BOMB_PROBE, str(file), str(tmp_path / "out")]
    done = subprocess.run(probe, cwd=ROOT, env=memory.environment(), capture_output=True, text=True, check=False)
    assert "take more than 256 MiB: lower output.rows_per_file" in done.stdout, done.stdout + done.stderr


def test_a_cell_that_is_too_long_costs_its_row_and_is_not_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CELL_BYTES", 1000)
    long = "y" * 2000
    write(
        tmp_path / "a.parquet",
        prompt=["a", "b", long, "d"],
        note=["n", long, "n", "n"],
        tags=[["t"], ["t"], ["t"], [long, "t"]],
    )
    job = make_job(tmp_path / "a.parquet", tmp_path / "out", input={"carry": ["note", "tags"]})
    reader = reader_of(job)
    data = reader.read(plan_of(job).units[0])
    reader.close()
    said = "holds {} bytes, above the limit of 1000 for a cell"
    assert [row.prompt for row in data.rows] == ["a", None, None, None]
    for row, column in zip(data.rows[1:], ("note", "prompt", "tags"), strict=True):
        assert str(row.error).startswith(f"column '{column}' holds 20")
        assert str(row.error).endswith(said.partition("{} ")[2])
    assert data.columns["note"].to_pylist() == ["n", None, "n", "n"]
    assert data.columns["tags"].to_pylist() == [["t"], ["t"], ["t"], None]


@pytest.mark.slow
def test_prompts_that_are_too_long_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNIT_BYTES", 5000)
    file = write(tmp_path / "a.parquet", n=[1, 2, 3])
    job = make_job(file, tmp_path / "out", input={"template": "{{ 'x' * 2000 }}{{ n }}"})
    reader = reader_of(job)
    with pytest.raises(InputError, match=r"rows 0 to 2: they or their prompts are too long together: lower"):
        reader.read(plan_of(job).units[0])
    reader.close()


def test_no_prompt_is_made_after_those_that_are_too_long_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit may have very many rows, and a template may make a long prompt of each."""
    monkeypatch.setattr(limits, "UNIT_BYTES", 100_000)
    job = make_job(write(tmp_path / "a.parquet", prompt=["x"] * 100), tmp_path / "out")
    reader, made = reader_of(job), 0

    def make(table: pa.Table) -> Iterator[Outcome]:
        nonlocal made
        for _ in range(table.num_rows):
            made += 1
            yield Prompt("x" * 10_000), None

    monkeypatch.setattr(reader._prompts, "make", make)
    with pytest.raises(InputError, match="they or their prompts are too long together"):
        reader.read(plan_of(job).units[0])
    reader.close()
    assert made == 11
