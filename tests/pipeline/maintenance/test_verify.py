"""Tests of `verify`: it finds no problem in a good output, and a problem in any damaged one."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.maintenance import part_check
from pipeline.maintenance.verify import verify
from pipeline.output.part import TOTALS_KEY, to_parquet
from pipeline.output.records import RECORD_KEY, from_json, to_json
from tests.pipeline.cases import make_job, open_ledger, plan_of, prompts, publish, run, write


def small_job(folder: Path, **sections: Any) -> Job:
    """Make a job over two files with 25 rows in three units, of which one row becomes an error row."""
    write(folder / "in/a.parquet", prompt=prompts(20), key=[*range(19), 3], note=[{"x": [i]} for i in range(20)])
    write(folder / "in/b.parquet", prompt=["x", None, "w", "y", "z"], key=[3, 30, None, 31, 32], note=[{"x": [1]}] * 5)
    sections["output"] = {"rows_per_file": 10}
    return make_job(folder / "in", folder / "out", **sections)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return small_job(tmp_path, input={"id_column": "key", "carry": ["note"]})


def problems(job: Job | Path) -> tuple[str, ...]:
    return verify(job.output.path if isinstance(job, Job) else str(job)).problems


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def record_of(part: Path) -> Path:
    return part.parent / "_job/units" / f"{part.stem.removeprefix('part-')}.json"


def edit(path: Path, **fields: Any) -> None:
    changed = {**from_json(path.read_bytes()), **fields}
    changed.pop("checksum", None)  # that of plan.json
    path.write_bytes(to_json(changed))


def rewrite(part: Path, change: Callable[[pa.Table], pa.Table], *, record: bool) -> None:
    """Change the table of a part but keep its name and footer. If `record` is true, make the commit record fit."""
    table = pq.read_table(part)
    changed = change(table).replace_schema_metadata(pq.read_metadata(part).metadata)
    data = to_parquet(changed)
    part.write_bytes(data)
    if record:
        edit(record_of(part), sha256=hashlib.sha256(data).hexdigest(), part_bytes=len(data))


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        return table.set_column(
            index, table.field(name), pa.array(change(table[name].to_pylist()), table.field(name).type)
        )

    return apply


@pytest.mark.parametrize("own_ids", [True, False])
def test_a_good_output_has_no_problems(tmp_path: Path, own_ids: bool) -> None:
    job = small_job(tmp_path, input={"id_column": "key", "carry": ["note"]} if own_ids else {})
    run(job)
    before = {path: path.stat().st_mtime_ns for path in Path(job.output.path).rglob("*")}
    seen: list[tuple[int, int]] = []
    found = verify(job.output.path, lambda done, total: seen.append((done, total)))
    assert found.problems == ()
    assert (found.totals.rows, found.totals.errors, found.totals.duplicate_ids) == (25, 1, 2 if own_ids else 0)
    assert found.totals.null_ids == own_ids
    assert found.summary().startswith("verified: 25 rows in 3 parts (")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert before == {path: path.stat().st_mtime_ns for path in Path(job.output.path).rglob("*")}


def test_records_of_before_loops_and_times_were_noted_are_good(job: Job) -> None:
    run(job)
    out = Path(job.output.path)

    def without(fields: dict[str, Any]) -> dict[str, Any]:
        assert fields.pop("degenerate", 0) == 0
        fields.pop("published", None)
        return fields

    for part in parts_of(out):
        table = pq.read_table(part)
        metadata = dict(table.schema.metadata or {})
        for key in (TOTALS_KEY.encode(), RECORD_KEY.encode()):
            metadata[key] = to_json(without(from_json(metadata[key])))
        data = to_parquet(table.replace_schema_metadata(metadata))
        part.write_bytes(data)
        fields = without(from_json(record_of(part).read_bytes()))
        fields |= {"sha256": hashlib.sha256(data).hexdigest(), "part_bytes": len(data)}
        record_of(part).write_bytes(to_json(fields))
    manifest = out / "_job/manifest.json"
    manifest.write_bytes(to_json(without(from_json(manifest.read_bytes()))))
    assert problems(job) == ()


def test_parts_above_the_memory_budget_are_read_in_pieces(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found damaged like other parts."""
    run(job)
    monkeypatch.setattr(part_check, "HELD_BYTES", 100)
    assert problems(job) == ()
    part = parts_of(Path(job.output.path))[1]
    data = bytearray(part.read_bytes())
    data[40] ^= 1
    part.write_bytes(data)
    assert any(part.name in text for text in problems(job))


def test_parts_wait_for_room_in_the_budget(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job)
    largest = max(part.stat().st_size for part in parts_of(Path(job.output.path)))
    monkeypatch.setattr(part_check, "HELD_BYTES", largest)  # one at a time
    assert problems(job) == ()


def test_an_unfinished_job_is_told_what_to_do(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    publish(job, plan, plan.units[:2])
    left = "not complete: 1 of 3 units have no part, such as b.parquet, rows 0 to 4; submit the job again"
    assert problems(job) == (left,)
    publish(job, plan, plan.units[2:])
    assert problems(job) == (
        "_SUCCESS is missing: the job did not complete; submit it again, and it completes or says why not",
        "_job/manifest.json is missing: submit the job again to have it written",
    )
    ledger.complete(plan, job, verify(job.output.path).totals, seconds=1.0)
    assert problems(job) == ()


def test_segments_of_units_under_way_are_none_of_the_problems(job: Job) -> None:
    plan = plan_of(job)
    open_ledger(job, plan)
    publish(job, plan, plan.units[:1])
    for unit in plan.units[:2]:
        path = Path(job.output.path) / f"_job/segments/{unit.id}/w-1.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"rows")
    findings = verify(job.output.path)
    found = [text for text in findings.problems if "segment" in text]
    assert (findings.wrong, findings.leftovers) == (1, 1)  # what is wrong is that the job is not complete
    assert found == [
        f"1 segment of finished units, such as _job/segments/{plan.units[0].id}/w-1.parquet: remove with `clean`"
    ]


def test_no_output_and_no_plan(tmp_path: Path, job: Job) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        verify(str(tmp_path / "nothing"))
    run(job)
    (Path(job.output.path) / "_job/plan.json").write_text("{")
    with pytest.raises(OutputError, match=r"_job/plan\.json cannot be read"):
        verify(job.output.path)


SAID: dict[str, tuple[Callable[[Path], object], str]] = {
    "part gone": (lambda out: parts_of(out)[0].unlink(), "not complete, though _SUCCESS is there: 1 of 3 units"),
    "truncated": (lambda out: os.truncate(parts_of(out)[0], 900), "is truncated, damaged or no part"),
    "copy": (
        lambda out: shutil.copy(parts_of(out)[0], out / "part-000000000000-0000000000.parquet"),
        "part-000000000000-0000000000.parquet is a copy or was renamed",
    ),
    "stray": (lambda out: (out / "notes.txt").write_text("x"), "notes.txt is not from this project: move it away"),
    "record": (
        lambda out: edit(record_of(parts_of(out)[0]), rows=3, ok=3, errors=0),
        "is damaged: rows is 3, its pieces have 5",
    ),
    "record's writer": (lambda out: edit(record_of(parts_of(out)[0]), writer="x"), "it says writer 'x', not '"),
    "no record": (lambda out: record_of(parts_of(out)[0]).unlink(), ".json is missing: submit the job again"),
    "manifest": (lambda out: edit(out / "_job/manifest.json", rows=24), "manifest.json says rows 24, not 25"),
    "duplicates": (
        lambda out: edit(out / "_job/manifest.json", duplicate_ids=0),
        "manifest.json says duplicate_ids 0, not 2",
    ),
    "order": (
        lambda out: rewrite(parts_of(out)[0], lambda table: table.take(list(range(table.num_rows))[::-1]), record=True),
        "its row 0 is b.parquet#4, not b.parquet#0",
    ),
    "file": (
        lambda out: rewrite(parts_of(out)[0], with_column("source_file", lambda v: ["c.parquet", *v[1:]]), record=True),
        "its row 0 is c.parquet#0, not b.parquet#0",
    ),
    "totals": (
        lambda out: rewrite(parts_of(out)[0], with_column("prompt_tokens", lambda v: [v[0] + 1, *v[1:]]), record=True),
        "its footer says prompt_tokens",
    ),
    "columns": (
        lambda out: rewrite(parts_of(out)[0], lambda table: table.drop_columns(["note"]), record=True),
        "its columns are not those of the plan",
    ),
    "column type": (
        lambda out: rewrite(
            parts_of(out)[0],
            lambda table: table.set_column(0, "id", pc.cast(table["id"], pa.string())),
            record=True,
        ),
        "its columns are not those of the plan",
    ),
}


LEFTOVERS: dict[str, Callable[[Path], object]] = {
    "stray": lambda out: (out / "notes.txt").touch(),
    "temporary": lambda out: (out / f"_job/.live.json.{'0' * 32}.tmp").touch(),
    "record": lambda out: shutil.copy(record_of(parts_of(out)[0]), out / "_job/units/000000000000-0000000000.json"),
}
"""Files that do not belong in the folder, beside rows that are right."""


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_leftovers_are_told_from_problems(job: Job, kind: str) -> None:
    run(job)
    LEFTOVERS[kind](Path(job.output.path))
    found = verify(job.output.path)
    assert (found.wrong, found.leftovers, len(found.findings)) == (0, 1, 1)
    assert found.summary().startswith("verified: 25 rows in 3 parts (")


@pytest.mark.slow
@pytest.mark.parametrize("damage", SAID)
def test_what_is_wrong_is_named(job: Job, damage: str) -> None:
    run(job)
    do, said = SAID[damage]
    do(Path(job.output.path))
    found = problems(job)
    assert len(found) == 1, found
    assert said in found[0]
    assert verify(job.output.path).wrong == (damage != "stray")


def test_without_its_record_every_page_of_a_part_is_read(job: Job) -> None:
    """Otherwise the next run would take the checksum of the damaged completions as that of the part."""
    run(job)
    part = parts_of(Path(job.output.path))[0]
    column = pq.read_metadata(part).row_group(0).column(2)
    assert column.path_in_schema == "completion"
    data = bytearray(part.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    part.write_bytes(data)
    record_of(part).unlink()
    assert any(f"{part.name}: its data is damaged: " in text for text in problems(job))


def test_generated_ids_are_file_and_row(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    run(job)
    part = parts_of(tmp_path / "out")[0]
    rewrite(part, with_column("id", lambda ids: [*ids[:-1], "a.parquet#7"]), record=True)
    assert problems(job) == (
        f"{part.name}: id is not `<file>#<row>` in every row; move it away and submit the job again",
    )


def test_what_verify_says_to_do_helps(job: Job) -> None:
    """If the files that it names are deleted and the job runs again, the output is good."""
    plan, _, _ = run(job)
    out = Path(job.output.path)
    parts = parts_of(out)
    os.truncate(parts[0], 100)
    record_of(parts[1]).unlink()
    edit(record_of(parts[2]), writer="x")
    for text in problems(job):
        if "move it away" in text:
            (out / text.split(" ")[0].rstrip(":")).unlink()
    ledger = open_ledger(job, plan)
    left = tuple(unit for unit in plan.units if unit.id not in ledger.finished(plan))
    assert len(left) == 1
    publish(job, plan, left)
    assert problems(job) == ()


# Any damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the outputs of two jobs over equal input, in out and other/out."""
    folder = tmp_path_factory.mktemp("verify")
    run(small_job(folder, input={"id_column": "key", "carry": ["note"]}))
    other = small_job(folder / "other", input={"id_column": "key", "carry": ["note"]}, generation={"seed": 1})
    run(other)
    return folder


def flip(path: Path, draw: st.DataObject) -> None:
    data = bytearray(path.read_bytes())
    data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path.write_bytes(data)


def cut(path: Path, draw: st.DataObject) -> None:
    os.truncate(path, draw.draw(st.integers(0, path.stat().st_size - 1)))


def append(path: Path, draw: st.DataObject) -> None:
    path.write_bytes(path.read_bytes() + draw.draw(st.binary(min_size=1, max_size=20)))


def swap(out: Path, draw: st.DataObject) -> None:
    one, two = draw.draw(st.permutations(parts_of(out)))[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def drop_row(out: Path, draw: st.DataObject) -> None:
    """Drop a row of a part or double it, and make the commit record fit."""
    part = draw.draw(st.sampled_from(parts_of(out)))
    rows = list(range(pq.read_metadata(part).num_rows))
    row = draw.draw(st.sampled_from(rows))
    kept = [r for r in rows if r != row] if draw.draw(st.booleans()) else sorted([*rows, row])
    rewrite(part, lambda table: table.take(kept), record=True)


def change_cell(out: Path, draw: st.DataObject) -> None:
    """Change a cell of a part, and leave the commit record as it is."""
    part = draw.draw(st.sampled_from(parts_of(out)))
    name = draw.draw(st.sampled_from(["completion", "replica"]))
    rewrite(part, with_column(name, lambda values: [f"{values[0]}!", *values[1:]]), record=False)


def edit_record(out: Path, draw: st.DataObject) -> None:
    part = draw.draw(st.sampled_from(parts_of(out)))
    fields = from_json(record_of(part).read_bytes())
    name = draw.draw(st.sampled_from(sorted(set(fields) - {"seconds"})))
    value: object = draw.draw(st.one_of(st.none(), st.integers(-1, 50), st.text(max_size=3), st.just([])))
    if value != fields[name]:
        edit(record_of(part), **{name: value})
    else:
        record_of(part).unlink()


def edit_manifest(out: Path, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(["rows", "ok", "errors", "completion_tokens", "duplicate_ids", "units", "files"]))
    edit(out / "_job/manifest.json", **{name: draw.draw(st.sampled_from([-1, None, 10**9, "x"]))})


def edit_plan(out: Path, draw: st.DataObject) -> None:
    plan = json.loads((out / "_job/plan.json").read_bytes())
    change = draw.draw(st.sampled_from(["rows", "units", "file", "field", "digest"]))
    if change in ("rows", "units"):
        plan[change] += 1
    elif change == "file":
        plan["files"][0]["name"] += "x"
    elif change == "field":
        plan["fingerprint"]["fields"]["generation.seed"] = 9
    else:
        plan["fingerprint"]["digest"] = "0" * 64
    (out / "_job/plan.json").write_bytes(to_json(plan))


def add_stray(out: Path, draw: st.DataObject) -> None:
    names = ["part-x.parquet", "data.csv", "_job/x", "_job/units/x.json", ".part.tmp", "deep/er/x", "_writable"]
    path = out / draw.draw(st.sampled_from(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw.draw(st.binary(max_size=3)))


def add_left(out: Path, draw: st.DataObject) -> None:
    """Add a segment or a temporary file, as a writer that died leaves it."""
    part = draw.draw(st.sampled_from(parts_of(out)))
    hidden = out / f".{part.name}.{'0' * 32}.tmp"
    segment = out / f"_job/segments/{part.stem.removeprefix('part-')}/w-000001.parquet"
    path = draw.draw(st.sampled_from([hidden, segment]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"rows")


def take_other(out: Path, draw: st.DataObject) -> None:
    """Put a part of another job over equal input in place of a part, with or without its record."""
    part = draw.draw(st.sampled_from(parts_of(out)))
    other = out.parent / "other/out" / part.name
    part.write_bytes(other.read_bytes())
    if draw.draw(st.booleans()):
        record_of(part).write_bytes(record_of(other).read_bytes())


def on_some(what: str, change: Callable[[Path, st.DataObject], object]) -> Callable[[Path, st.DataObject], None]:
    def apply(out: Path, draw: st.DataObject) -> None:
        change(draw.draw(st.sampled_from(sorted(out.glob(what)))), draw)

    return apply


def remove(path: Path, _draw: st.DataObject) -> None:
    path.unlink()


ANOTHER = "part-0123456789ab-0000000000.parquet"
DAMAGES: list[Callable[[Path, st.DataObject], None]] = [
    on_some("part-*", flip),
    on_some("part-*", cut),
    on_some("part-*", append),
    on_some("part-*", remove),
    on_some("part-*", lambda part, _: shutil.copy(part, part.with_name(ANOTHER))),
    on_some("part-*", lambda part, _: part.rename(part.with_name(ANOTHER))),
    on_some("_job/units/*", remove),
    on_some("_job/units/*", cut),
    on_some("_job/*.json", remove),
    on_some("_job/*.json", cut),
    on_some("_SUCCESS", remove),
    swap,
    drop_row,
    change_cell,
    edit_record,
    edit_manifest,
    edit_plan,
    add_stray,
    add_left,
    take_other,
]


@pytest.mark.slow
@settings(max_examples=150)
@given(damage=st.sampled_from(DAMAGES), draw=st.data())
def test_any_damage_is_found(good: Path, damage: Callable[[Path, st.DataObject], None], draw: st.DataObject) -> None:
    out, work = good / "out", good / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(out, work)
    damage(work, draw)
    try:
        found = verify(str(work)).problems
    except OutputError:  # the plan itself is damaged
        return
    assert found
    assert all("\n" not in text for text in found)


def test_the_output_that_is_damaged_was_good(good: Path) -> None:
    assert problems(good / "out") == ()
    assert problems(good / "other/out") == ()
