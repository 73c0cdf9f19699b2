"""Tests of output.keep_prompt: the text of every prompt is in the output, whatever happens to the job meanwhile, and an
output without it is as it always was."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from model.requests import Completion
from pipeline.config.job import Job
from pipeline.config.loader import load_job
from pipeline.core.errors import JobError, OutputError
from pipeline.core.schema import RESULT_COLUMNS
from pipeline.core.types import Assignment
from pipeline.maintenance.retry_errors import make_retry_job
from pipeline.maintenance.verify import verify
from pipeline.output.ledger import read_status
from pipeline.report.html import make_html
from pipeline.report.summary import read_report
from tests.pipeline.cases import make_job, not_utf8, open_ledger, out, plan_of, prompts, publish, run, write
from tests.workers.fakes import TOO_LONG, FakeEngine, make_runner, work_all
from tests.workers.jobs import open_job, prompts_of
from tests.workers.units.engines import wait_for_flushes
from tests.workers.units.resume_cases import EACH_ROW, segments_of, with_bad_rows

KEEP = {"keep_prompt": True, "rows_per_file": 8}


class Killed(Exception):  # noqa: N818
    """Stands for the death of the process."""


class DyingEngine(FakeEngine):
    """An engine that dies before its step 13."""

    def step(self) -> list[Completion]:
        if self.steps == 12:
            raise Killed
        return super().step()


def rows_of(job: Job) -> list[dict[str, Any]]:
    """Return the rows of all parts of a job, in the order of the input."""
    rows = [row for file in out(job).glob("part-*") for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["source_file"], row["source_row"]))


def test_a_part_has_the_prompts_after_the_carried_columns(tmp_path: Path) -> None:
    """A prompt that is null, empty or not text is null in the output."""
    texts = not_utf8(b"Write.\nAnswer: ", None, b"", b"\xff", "é⏎".encode())
    write(tmp_path / "in/a.parquet", prompt=texts, n=[1, 2, 3, 4, 5])
    job = make_job(tmp_path / "in", tmp_path / "out", output=KEEP, input={"carry": ["n"]})
    run(job)
    [part] = out(job).glob("part-*")
    schema = pq.read_schema(part)
    assert schema.names == ["id", "n", "prompt", *RESULT_COLUMNS]
    assert schema.field("prompt").type == pa.string()
    assert [row["prompt"] for row in rows_of(job)] == ["Write.\nAnswer: ", None, None, None, "é⏎"]
    assert [row["completion"] for row in rows_of(job)][::4] == ["answer to Write.\nAnswer: ", "answer to é⏎"]
    assert verify(job.output.path).problems == ()
    assert read_status(job.output.path).complete
    assert b"5 rows" in make_html(read_report(job.output.path))


def test_prompts_are_stored_as_completions_are(tmp_path: Path) -> None:
    """They have neither a dictionary nor statistics: hardly any prompt occurs twice, and nobody selects them by
    range."""
    write(tmp_path / "in/a.parquet", prompt=prompts(50))
    job = make_job(tmp_path / "in", tmp_path / "out", output={"keep_prompt": True})
    run(job)
    [part] = out(job).glob("part-*")
    group = pq.read_metadata(part).row_group(0)
    by_name = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    for name in ("prompt", "completion"):
        assert not by_name[name].has_dictionary_page
        assert not by_name[name].is_stats_set
    assert by_name["finish_reason"].has_dictionary_page


@pytest.mark.slow
def test_a_template_gives_its_whole_text_with_control_tokens_spelled_out(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", title=["One", None, "<eos>"], body=["x", "y", "z"])
    template = "<bos>{{ title }}\n{{ body }}<sep>"
    job = make_job(tmp_path / "in", tmp_path / "out", output=KEEP, input={"template": template})
    run(job)
    rows = rows_of(job)
    assert [row["prompt"] for row in rows] == ["<bos>One\nx<sep>", None, "<bos><eos>\nz<sep>"]
    assert [row["finish_reason"] for row in rows] == ["stop", "error", "stop"]
    assert verify(job.output.path).problems == ()


def test_parts_with_and_without_the_column_are_told_apart(tmp_path: Path) -> None:
    """A part whose column was dropped, or that has one too many, is not the plan's."""
    write(tmp_path / "in/a.parquet", prompt=prompts(9))
    jobs = [make_job(tmp_path / "in", tmp_path / f"out{keep}", output={"keep_prompt": keep}) for keep in (True, False)]
    for job in jobs:
        run(job)
        assert verify(job.output.path).problems == ()
    kept, other = (next(out(job).glob("part-*")) for job in jobs)
    tables = [pq.read_table(kept).drop_columns(["prompt"]), pq.read_table(other)]
    tables[1] = tables[1].add_column(1, "prompt", pq.read_table(kept)["prompt"])
    for job, part, table in zip(jobs, (kept, other), tables, strict=True):
        pq.write_table(table.replace_schema_metadata(pq.read_metadata(part).metadata), part)
        assert any("its columns are not those of the plan" in text for text in verify(job.output.path).problems)


def test_retry_errors_keeps_the_prompts_too(tmp_path: Path) -> None:
    """The column of the input may itself be called prompt."""
    texts: list[str | None] = [*prompts(20)]
    texts[3], texts[11] = None, ""
    write(tmp_path / "in/a.parquet", prompt=texts)
    job = make_job(tmp_path / "in", tmp_path / "out", output=KEEP)
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    assert made.rows == 2
    # the cause is gone
    [file] = (tmp_path / "retry/input").glob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", pa.array(["now", "there"])), file)
    again = load_job(made.job_file)
    assert again.output.keep_prompt
    run(again)
    assert verify(again.output.path).problems == ()
    told = [(row["id"], row["prompt"], row["completion"]) for row in rows_of(again)]
    assert told == [("a.parquet#3", "now", "answer to now"), ("a.parquet#11", "there", "answer to there")]


def test_a_begun_output_neither_gains_nor_loses_the_column(tmp_path: Path) -> None:
    """The refusal names the setting, however many columns are carried."""
    carried: dict[str, Any] = {f"a_column_with_a_long_name_{number}": list(range(30)) for number in range(9)}
    write(tmp_path / "in/a.parquet", prompt=prompts(30), **carried)

    def job(folder: str, **settings: Any) -> Job:
        output = {"rows_per_file": 10, **settings}
        return make_job(tmp_path / "in", tmp_path / folder, output=output, input={"carry": sorted(carried)})

    for folder, begun, other, change in (
        ("out1", job("out1"), job("out1", keep_prompt=True), "null -> true"),
        ("out2", job("out2", keep_prompt=True), job("out2"), "true -> null"),
    ):
        plan = plan_of(begun)
        open_ledger(begun, plan)
        publish(begun, plan, plan.units[:1])
        with pytest.raises(OutputError) as refused:
            open_ledger(other, plan_of(other))
        assert str(refused.value) == (
            f"output {tmp_path}/{folder} belongs to another job; what differs (there -> here): "
            f"output.keep_prompt: {change}. Use another output.path"
        )
        open_ledger(begun, plan_of(begun))


def test_an_output_without_it_keeps_its_fingerprint(tmp_path: Path) -> None:
    """The setting is no field of the fingerprint; the column is, where it is wanted."""
    write(tmp_path / "in/a.parquet", prompt=prompts(3))
    usual, off, on = (
        plan_of(make_job(tmp_path / "in", tmp_path / "out", output=output)).fingerprint
        for output in ({}, {"keep_prompt": False}, {"keep_prompt": True})
    )
    assert usual == off
    assert usual.fields["output columns"] == {"id": "string"}
    assert on.fields == {**usual.fields, "output columns": {"id": "string", "prompt": "string"}}
    assert on.digest != usual.digest


def test_a_carried_prompt_is_another_job_than_a_kept_one(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(3))
    carried = make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["prompt"]})
    run(carried)
    kept = make_job(tmp_path / "in", tmp_path / "out", output={"keep_prompt": True})
    with pytest.raises(OutputError, match=r'input\.carry: \["prompt"\] -> \[\].*; output\.keep_prompt: null -> true'):
        open_ledger(kept, plan_of(kept))


@pytest.mark.parametrize("name", ["prompt", "Prompt"])
def test_a_carried_column_of_that_name_is_refused(tmp_path: Path, name: str) -> None:
    """Readers such as DuckDB do not tell Prompt from prompt."""
    file = tmp_path / "job.yaml"
    file.write_text(f"""
        input: {{path: {tmp_path}/in, carry: [n, {name}]}}
        output: {{path: {tmp_path}/out, keep_prompt: true}}
        model: {{checkpoint: "builtin:noise"}}
    """)
    with pytest.raises(JobError) as refused:
        load_job(file)
    said = f"output.keep_prompt adds a column prompt, and input.carry copies column '{name}' to that name: keep one of"
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert load_job(file, ["output.keep_prompt=false"]).input.carry == ("n", name)
    with pytest.raises(ValidationError):
        make_job("in", "out", input={"carry": [name]}, output={"keep_prompt": True})


def test_an_interrupted_job_has_all_prompts_after_its_resume(tmp_path: Path) -> None:
    """Rows come from segments of the first attempt, from the second attempt and from bad rows. The row that is too long
    for the engine and the one without tokens keep their prompts."""
    given = with_bad_rows(30)
    section = {"path": str(tmp_path / "out"), "rows_per_file": 30, "keep_prompt": True}
    small = open_job(tmp_path, given, output=section, **EACH_ROW)
    [unit] = small.plan.units
    first = make_runner(small, DyingEngine())
    wait_for_flushes(first)
    first.add(Assignment(unit))
    with pytest.raises(Killed):
        work_all(first)
    first.close()
    saved = len(segments_of(small))
    assert not list((tmp_path / "out").glob("part-*"))
    second = make_runner(small, engine := FakeEngine())
    second.add(Assignment(unit, attempt=2))
    work_all(second)
    rows = small.rows()
    assert [row["prompt"] for row in rows] == given
    assert {row["attempt"] for row in rows if row["error"] is None} == {1, 2}
    assert saved > 5
    assert engine.ended < 27
    by_error = {row["error"]: row["prompt"] for row in rows if row["error"]}
    assert by_error["prompt is null"] is None
    assert len(by_error[next(text for text in by_error if str(TOO_LONG) in text)]) == TOO_LONG + 1
    assert by_error["the prompt has no tokens"] == " "
    assert verify(str(tmp_path / "out")).totals.errors == 3


def test_units_that_are_read_again_get_their_prompts(tmp_path: Path) -> None:
    """A part that is lost and made again is the same, with its prompts."""
    write(tmp_path / "in/a.parquet", prompt=prompts_of(20))
    job = make_job(tmp_path / "in", tmp_path / "out", output=KEEP)
    plan, _, _ = run(job)
    before = rows_of(job)
    out(job, f"part-{plan.units[1].id}.parquet").unlink()
    publish(job, plan, plan.units[1:2])
    assert rows_of(job) == before
    assert verify(job.output.path).problems == ()
