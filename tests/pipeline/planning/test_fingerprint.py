"""Tests of the differences between two jobs and between two listings, and of their texts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.schema import output_schema, plain_type
from pipeline.planning.fingerprint import column_types, differences, listing_change

LISTINGS = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(0, 1), st.sampled_from("xy"), st.integers(0, 1))
)


@given(old=LISTINGS, new=LISTINGS)
def test_every_file_that_differs_is_named_once(
    old: dict[str, tuple[int, str, int]], new: dict[str, tuple[int, str, int]]
) -> None:
    change = listing_change(old, new)
    named = [*change.added, *change.removed, *change.rewritten]
    assert sorted(named) == [name for name in "abcdef" if old.get(name) != new.get(name)]
    assert change.any == (old != new)
    assert change.only_added == (old != new and old.items() <= new.items())


def test_at_most_three_files_are_named() -> None:
    old, new = {"a": (1, "x", 1), "b": (1, "x", 1)}, {"a": (2, "x", 1), **dict.fromkeys("cdef", (1, "x", 1))}
    assert str(listing_change(old, new)) == "a has changed, b is gone, c is new and 3 more"


def test_settings_that_differ_are_shown() -> None:
    assert differences({"a": 1, "b": None, "c": [1]}, {"a": 1, "b": "x" * 70, "d": 2}) == [
        f'b: null -> "{"x" * 58}…',
        "c: [1] -> null",
        "d: null -> 2",
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.struct([("x", pa.large_list(pa.int8()))])),
        pa.map_(pa.string(), pa.int32()),
        pa.list_(pa.int8(), 2),
        pa.timestamp("us", "UTC"),
        pa.dictionary(pa.int32(), pa.string()),
        pa.decimal128(20, 3),
        pa.null(),
        pa.large_string(),
    ],
    ids=str,
)
def test_a_planned_type_and_the_stored_one_have_one_name(kind: pa.DataType) -> None:
    """Parquet calls the items of a list `element`, and gives the entries of a map names."""
    schema = output_schema(pa.int64(), [pa.field("column", plain_type(kind))])
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    stored = pq.read_schema(pa.BufferReader(sink.getvalue()))
    assert column_types(stored) == column_types(schema)
    assert column_types(schema).keys() == {"id", "column"}
