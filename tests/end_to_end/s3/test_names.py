"""Tests keys with odd names on a real S3 server: they work from the plan to the parts, or are refused in one line."""

from pathlib import Path

import duckdb
import pytest

from pipeline.core.errors import InputError
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, plan_of, run, write

pytestmark = [pytest.mark.server]

NAMES = [
    *("with space", "a#b", "50%", "%2e%2e", "what?x", "a+b", "c:d", "'quote'", "semi;colon&", "~", "a..b"),
    *("gr\u00f6\u00dfe", "gro\u0308\u00dfe", "\u202eright-to-left", "\U0001f600", "n" * 240),
]


def test_odd_keys_work_from_plan_to_duckdb(s3: str, tmp_path: Path) -> None:
    source, target = Storage(f"{s3}/in #1 50%"), f"{s3}/\U0001f600 out"
    for number, name in enumerate(NAMES):
        file = write(tmp_path / "one.parquet", prompt=[f"p{number}"])
        source.write(f"{name}/{name}.parquet", file.read_bytes())
    run(make_job(source.root, target))
    parts = Storage(target)
    for part in parts.list_files("", "part-*.parquet"):
        (tmp_path / part.name).write_bytes(parts.read(part.name))
    found = duckdb.execute(f"SELECT source_file, completion FROM '{tmp_path}/part-*.parquet'").fetchall()
    assert dict(found) == {f"{name}/{name}.parquet": f"answer to p{i}" for i, name in enumerate(NAMES)}


def test_a_key_with_a_line_break_is_refused_in_one_line(s3: str, tmp_path: Path) -> None:
    Storage(s3).write("a\nb.parquet", write(tmp_path / "one.parquet", prompt=["x"]).read_bytes())
    with pytest.raises(InputError) as caught:
        plan_of(make_job(s3, tmp_path / "out"))
    assert str(caught.value).endswith(r"a\nb.parquet is a name with a control character: rename it")
