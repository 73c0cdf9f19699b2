"""Tests of `output.target_mb`: units give parts of about one size, estimated from footers, and are the same in each
plan."""

import dataclasses
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from model.requests import Completion
from pipeline.config.job import Job, OutputSection
from pipeline.core.errors import InputError, OutputError
from pipeline.core.types import RowResult
from pipeline.input.unit_reader import UnitData
from pipeline.output.part import build_part, result_table
from pipeline.planning.part_size import MAX_ROWS, STORED_SHARE, carried_bytes, rows_per_unit
from tests.pipeline.cases import make_job, open_ledger, plan_of, prompts, publish, reader_of, write

PROSE = "\n".join(text for _, text in sorted(topics.items()))
"""The text of Python's language reference, which comes with Python: English with code in it."""
LIMIT = 256


def sized(folder: Path, target_mb: float, **sections: dict[str, Any]) -> Job:
    sections = {"generation": {"max_new_tokens": LIMIT}, **sections}
    return make_job(folder / "in", folder / "out", output={"target_mb": target_mb}, **sections)


def written(data: UnitData, random: random.Random, schema: pa.Schema) -> bytes:
    """Return the unit's part: completions of 0.2 to 1 times the limit, with four letters of prose per token, and random
    times and steps."""

    def complete(index: int, key: str) -> RowResult:
        tokens = random.randint(LIMIT // 5, LIMIT)
        start = random.randrange(len(PROSE) - 4 * LIMIT)
        steps = tuple(random.randint(1, 16) for _ in range(-(-tokens // 16)))
        queue_s, work_s = random.random(), [random.random() for _ in range(3)]
        done = Completion(
            key=key,
            token_ids=tuple(range(tokens)),
            text=PROSE[start : start + 4 * tokens],
            finish_reason=random.choice(["stop", "length"]),
            prompt_tokens=random.randint(10, 900),
            denoiser_forwards=sum(steps),
            steps_per_block=steps,
            mean_confidence=random.random(),
            queue_s=queue_s,
            prefill_s=work_s[0],
            denoise_s=work_s[1],
            commit_s=work_s[2],
            latency_s=queue_s + sum(work_s),
            batch_rows=random.uniform(1, 256),
        )
        return RowResult(index, done, "diffusion", 1, random.choice(["r0", "r1"]), 0.0)

    results = [complete(row.index, row.key) for row in data.rows]
    return build_part(data, [result_table(data.unit, results)], schema, {})[0]


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_parts_are_of_about_the_size_asked_for(tmp_path: Path, codec: Literal["zstd", "none"]) -> None:
    """Each real part, with carried text, is within a factor of two of the size, whether the input is compressed or
    not."""
    random_ = random.Random(5)
    starts = [random_.randrange(len(PROSE) - 800) for _ in range(1500)]
    texts = [PROSE[start : start + random_.randint(100, 800)] for start in starts]
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": prompts(1500), "text": texts, "key": list(range(1500))})
    pq.write_table(table, tmp_path / "in/a.parquet", compression=codec)
    job = sized(tmp_path, 0.2, input={"carry": ["text"], "id_column": "key"})
    plan = plan_of(job)
    reader = reader_of(job)
    sizes = [len(written(reader.read(unit), random_, plan.schema)) / 1e6 for unit in plan.units]
    reader.close()
    assert len(sizes) > 2
    assert all(0.1 < size < 0.4 for size in sizes), sizes


def test_a_plan_is_the_same_each_time_and_a_resume_finds_its_units(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(900))
    job = sized(tmp_path, 0.1)
    plan = plan_of(job)
    assert len(plan.units) > 2
    open_ledger(job, plan)
    publish(job, plan, plan.units[:2])
    again = plan_of(job)
    assert again == plan
    assert open_ledger(job, again).finished(again).keys() == {unit.id for unit in plan.units[:2]}
    write(tmp_path / "in/b.parquet", prompt=prompts(500))  # units of a file do not depend on the others
    assert plan_of(job).units[: len(plan.units)] == plan.units


def test_another_size_is_another_job(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(900))
    job = sized(tmp_path, 0.1)
    plan = plan_of(job)
    open_ledger(job, plan)
    publish(job, plan, plan.units[:1])
    other = sized(tmp_path, 0.2)
    with pytest.raises(OutputError, match=r"output\.target_mb: 0\.1 -> 0\.2"):
        open_ledger(other, plan_of(other))
    by_rows = make_job(tmp_path / "in", tmp_path / "out", generation={"max_new_tokens": LIMIT})
    with pytest.raises(OutputError, match=r"output\.rows_per_file: null -> 10000.*output\.target_mb: 0\.1 -> null"):
        open_ledger(by_rows, plan_of(by_rows))
    assert not any("target_mb" in name or "estimate" in name for name in plan_of(by_rows).fingerprint.fields)


def test_the_estimate_grows_with_what_a_row_holds(tmp_path: Path) -> None:
    def rows(carried: float = 0.0, **generation: int) -> int:
        job = sized(tmp_path, 128, generation=generation) if generation else sized(tmp_path, 128)
        return rows_per_unit(job, 1000, carried)

    assert rows() == 405_063  # 128,000,000 / (60 + 256)
    assert rows(max_new_tokens=2048) < rows() / 6
    assert rows(carried=1000 * 316.0) == rows() // 2
    assert rows_per_unit(sized(tmp_path, 0.0001), 1000, 1e12) == 1
    assert rows_per_unit(sized(tmp_path, 2000, generation={"max_new_tokens": 1}), 1000, 0.0) == MAX_ROWS


def test_only_what_goes_to_the_output_is_measured(tmp_path: Path) -> None:
    """Sizes are those of leaves: a nested column has several of them, and `text` is not `text2`."""
    columns = {"text": ["x" * 50] * 9, "text2": ["y" * 90] * 9, "pairs": [{"a": "v" * 20, "b": 1}] * 9}
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/a.parquet"
    pq.write_table(pa.table(columns), file, compression="none", use_dictionary=False)
    metadata, size = pq.read_metadata(file), file.stat().st_size
    group = metadata.row_group(0)
    by_path = {group.column(i).path_in_schema: group.column(i).total_compressed_size for i in range(group.num_columns)}
    assert carried_bytes(metadata, ["text"], size) == STORED_SHARE * by_path["text"]
    assert carried_bytes(metadata, ["pairs"], size) == STORED_SHARE * (by_path["pairs.a"] + by_path["pairs.b"])
    assert carried_bytes(metadata, [], size) == 0
    assert carried_bytes(metadata, ["text"], 10) == 10  # a footer may claim more than the file holds


def test_kept_prompts_count_as_carried_columns_do(tmp_path: Path) -> None:
    """Prompts of a template count with the columns that it reads."""
    texts = [PROSE[start : start + 400] for start in range(0, 400 * 900, 400)]
    write(tmp_path / "in/a.parquet", prompt=texts, text=texts)

    def units(folder: str, output: dict[str, Any] | None = None, **section: Any) -> list[int]:
        size = {"target_mb": 0.1, **(output or {})}
        job = make_job(
            tmp_path / "in", tmp_path / folder, input=section, output=size, generation={"max_new_tokens": 64}
        )
        return [unit.row_count for unit in plan_of(job).units]

    keep = {"keep_prompt": True}
    assert units("a", keep) == units("b", carry=["prompt"])
    assert len(units("a", keep)) > len(units("b"))
    assert units("c", keep, template="Repeat: {{ text }}") == units("a", keep)


def test_exactly_one_of_the_two_is_given() -> None:
    def section(**values: Any) -> OutputSection:
        return OutputSection.model_validate({"path": "o", **values})

    assert (section().rows_per_file, section().target_mb) == (10_000, None)
    assert section(rows_per_file=None).rows_per_file == 10_000
    assert section(rows_per_file=None, target_mb=128) == section(target_mb=128.0)
    assert section(target_mb=128).rows_per_file is None
    assert (section(target_mb=128).part_limit, section().part_limit) == ("about 128 MB", "at most 10,000 rows")
    with pytest.raises(ValidationError, match="rows_per_file and target_mb are both given: keep one of them"):
        section(rows_per_file=5, target_mb=128)
    for wrong in (0, -1, 2001, "128"):
        with pytest.raises(ValidationError):
            section(target_mb=wrong)
    stored = section(target_mb=64).model_dump(mode="json")  # the form in plan.json
    assert OutputSection.model_validate(stored) == section(target_mb=64)


def test_too_many_units_name_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(20))
    monkeypatch.setattr("pipeline.planning.plan.MAX_UNITS", 10)
    with pytest.raises(InputError, match=r"makes more than 10 units: raise output\.target_mb"):
        plan_of(sized(tmp_path, 0.0001))


def test_a_planned_size_is_frozen_with_the_job(tmp_path: Path) -> None:
    with pytest.raises((ValidationError, dataclasses.FrozenInstanceError)):
        sized(tmp_path, 1).output.target_mb = 2.0
