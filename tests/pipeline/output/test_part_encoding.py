"""Tests of parts as files: analytics tools can read their footers and pages, and read them fast."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.schema import RESULT_COLUMNS, RESULT_SCHEMA
from pipeline.output import part
from pipeline.output.part import encode_part
from tests.pipeline.cases import make_job, part_of, plan_of, prompts, reader_of, write

SPARK_READS = {
    ("BYTE_ARRAY", "String"),
    ("INT32", "None"),
    ("INT32", "Int(bitWidth=16, isSigned=true)"),
    ("INT32", "Int(bitWidth=32, isSigned=true)"),
    ("INT64", "None"),
    ("INT64", "Int(bitWidth=64, isSigned=true)"),
    ("DOUBLE", "None"),
}
"""The physical and logical types that Spark 3 reads as string, short, int, long and double."""
DATA_PAGE_V1 = 0


def file_of(folder: Path, columns: dict[str, Any], **settings: Any) -> tuple[bytes, pq.ParquetFile]:
    """Return the part of a job over these columns, as bytes and as a file opened by pyarrow."""
    write(folder / "in/a.parquet", **columns)
    job = make_job(folder / "in", folder / "out", input=settings)
    plan = plan_of(job)
    reader = reader_of(job)
    data = part_of(reader.read(plan.units[0]), plan)
    reader.close()
    return data, pq.ParquetFile(pa.BufferReader(data))


def chunks(file: pq.ParquetFile) -> dict[str, Any]:
    """Return the column chunks of the first row group, by the paths of their leaves."""
    group = file.metadata.row_group(0)
    return {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}


def order(file: pq.ParquetFile) -> list[str]:
    """Return the leaves by which the first row group says that it is sorted."""
    group = file.metadata.row_group(0)
    for column in group.sorting_columns:
        assert not column.descending
    return [group.column(column.column_index).path_in_schema for column in group.sorting_columns]


CARRIED: dict[str, Any] = {
    "key": [3, 5, 9],
    "lang": pa.array(["en", "de", "en"]).dictionary_encode(),
    "long": pa.array(["a", "b", "b"], pa.large_string()),
    "view": pa.array(["a", "b", "b"], pa.string_view()),
    "tags": [["x", "y"], [], None],
    "more": [{"a": 1, "b": ["t"]}, {"a": 1, "b": None}, None],
    "pairs": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
}


def carried(folder: Path) -> tuple[bytes, pq.ParquetFile]:
    columns = {"prompt": prompts(3), **CARRIED}
    return file_of(folder, columns, id_column="key", carry=[name for name in CARRIED if name != "key"])


def test_every_column_is_zstd_with_a_page_index_in_pages_of_version_1(tmp_path: Path) -> None:
    data, file = carried(tmp_path)
    for path, chunk in chunks(file).items():
        assert chunk.compression == "ZSTD", path
        assert chunk.has_offset_index, path
        # A page header begins with field 1, its type, in Thrift's compact protocol.
        assert data[chunk.data_page_offset : chunk.data_page_offset + 2] == bytes([0x15, DATA_PAGE_V1]), path
        assert set(chunk.encodings) <= {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}, path


def test_columns_of_few_values_have_a_dictionary_and_columns_of_many_do_not(tmp_path: Path) -> None:
    """A nested column is named by its leaves, and each of them gets a dictionary."""
    _, file = carried(tmp_path)
    with_one = {path for path, chunk in chunks(file).items() if chunk.has_dictionary_page}
    leaves = {"lang", "long", "view", "tags.list.element", "more.a", "more.b.list.element"}
    leaves |= {"pairs.key_value.key", "pairs.key_value.value"}
    assert leaves | {"finish_reason", "mode", "replica", "source_file", "attempt", "error"} <= with_one
    assert with_one.isdisjoint({"id", "completion", "queue_s", "latency_s", "source_row"})


def test_every_column_but_the_completion_has_statistics(tmp_path: Path) -> None:
    """With them, a reader can skip what cannot hold a given id, reason, row, or value of a carried column."""
    _, file = carried(tmp_path)
    found = chunks(file)
    assert {path for path, chunk in found.items() if not chunk.is_stats_set} == {"completion"}
    assert {path for path, chunk in found.items() if not chunk.has_column_index} == {"completion"}
    said = {name: (found[name].statistics.min, found[name].statistics.max) for name in ("id", "lang", "source_row")}
    assert said == {"id": (3, 9), "lang": ("de", "en"), "source_row": (0, 2)}
    assert found["error"].statistics.null_count == 3
    assert (found["finish_reason"].statistics.min, found["finish_reason"].statistics.max) == ("length", "stop")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 4, 4, 9], ["id", "source_file", "source_row"]),
        (["a", "b", "é", "\U0001f600"], ["id", "source_file", "source_row"]),  # by bytes, as Parquet orders text
        ([4, 1, 5, 6], ["source_file", "source_row"]),
        ([None, 1, 2, 3], ["source_file", "source_row"]),
        (["a", "é", "b", "c"], ["source_file", "source_row"]),
    ],
)
def test_a_part_says_that_its_ids_are_sorted_only_where_they_are(
    tmp_path: Path, ids: list[Any], expected: list[str]
) -> None:
    """A carried column with several leaves comes before source_file, so the number of a leaf is not that of its
    column."""
    columns = {"prompt": prompts(4), "key": ids, "pairs": [{"a": 1, "b": 2}] * 4}
    _, file = file_of(tmp_path, columns, id_column="key", carry=["pairs"])
    assert order(file) == expected


def test_ids_made_of_file_and_row_are_not_said_to_be_sorted(tmp_path: Path) -> None:
    """In the order of text, a.parquet#10 comes before a.parquet#9."""
    assert order(file_of(tmp_path / "few", {"prompt": prompts(10)})[1])[0] == "id"
    assert order(file_of(tmp_path / "more", {"prompt": prompts(11)})[1]) == ["source_file", "source_row"]


def test_the_types_are_those_that_spark_reads(tmp_path: Path) -> None:
    """The types do not depend on how the input's writer stored text. Lists have three levels, and the inner one is
    named element."""
    _, file = carried(tmp_path)
    leaves = [file.schema.column(i) for i in range(len(file.schema))]
    own = [leaf for leaf in leaves if leaf.path.split(".")[0] in {"id", "lang", "long", "view", *RESULT_COLUMNS}]
    assert len(own) == 4 + len(RESULT_COLUMNS)
    for leaf in own:
        assert (leaf.physical_type, str(leaf.logical_type)) in SPARK_READS, leaf.path
    assert "steps_per_block.list.element" in {leaf.path for leaf in own}
    kinds = {file.schema_arrow.field(name).type for name in ("lang", "long", "view", "completion", "source_file")}
    assert kinds == {pa.string()}


def rows(count: int) -> pa.Table:
    filled = {field.name: pa.nulls(count, field.type) for field in RESULT_SCHEMA}
    return pa.table({"id": pa.array(range(count)), **filled, "completion": ["x" * 92] * count})


def test_row_groups_are_small_enough_for_one_task_of_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(table: pa.Table) -> list[int]:
        metadata = pq.read_metadata(pa.BufferReader(encode_part(table)))
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    assert groups(rows(10_000)) == [10_000]
    assert groups(rows(210_000)) == [70_000] * 3
    table = rows(10_000)
    monkeypatch.setattr(part, "GROUP_BYTES", table.nbytes / 4.5)
    assert groups(table) == [2_000] * 5


def test_a_part_reads_back_as_it_was() -> None:
    table = rows(3).replace_schema_metadata({"k": "v"})
    again = pq.read_table(pa.BufferReader(encode_part(table)))
    assert again.equals(table)
    assert (again.schema.metadata or {})[b"k"] == b"v"
