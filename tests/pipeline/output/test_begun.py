"""Tests that an output which was begun before is continued with the prompts that it was begun with, or refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from model.checkpoint.chat_texts import ChatTexts
from model.checkpoint.reader import open_checkpoint
from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.maintenance.verify import verify
from pipeline.output.begun import plan_job, read_begun
from pipeline.output.ledger import Ledger
from pipeline.output.records import read_part
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.prompts import Begun, ModelTexts
from tests.pipeline.cases import load, make_job, open_ledger, out, prompts, publish, store_of, write

CHECKPOINT = open_checkpoint("builtin:noise")


def begin(folder: Path, *, rules: int, rows: bool = True, **settings: Any) -> Job:
    """Begin the output of a job by this version of the rules, and publish the first of its units if `rows` is true."""
    write(folder / "in/a.parquet", prompt=prompts(20), n=list(range(20)))
    job = make_job(folder / "in", folder / "out", output={"rows_per_file": 10}, input=settings)
    plan = make_plan(job, checkpoint_identity=CHECKPOINT.identity(), begun=Begun(rules))
    if rules == 1:  # as the earlier version wrote it: without the field
        plan.fingerprint.fields.pop("prompts", None)
    open_ledger(job, plan)
    if rows:
        publish(job, plan, plan.units[:1])
    return job


def resume(job: Job) -> Plan:
    plan = plan_job(job, CHECKPOINT)
    Ledger(job.output.path, plan.fingerprint.digest).open(plan, job)
    return plan


def test_an_old_output_with_a_prompt_column_goes_on_by_the_old_rules(tmp_path: Path) -> None:
    plan = resume(begin(tmp_path, rules=1))
    assert plan.prompts.rules == 1
    assert "prompts" not in plan.fingerprint.fields


def test_a_lost_plan_of_an_old_output_is_made_again_by_the_old_rules(tmp_path: Path) -> None:
    """Its parts name version 1 of the rules of prompts."""
    job = begin(tmp_path, rules=1)
    stored = load(out(job, "_job/plan.json"))
    out(job, "_job/plan.json").unlink()
    plan = resume(job)
    assert plan.prompts.rules == 1
    assert load(out(job, "_job/plan.json"))["fingerprint"] == stored["fingerprint"]


def test_an_old_output_without_rows_is_begun_again_by_the_new_rules(tmp_path: Path) -> None:
    plan = resume(begin(tmp_path, rules=1, rows=False))
    assert plan.prompts.rules == 2
    assert load(out(begin_job(tmp_path), "_job/plan.json"))["fingerprint"]["fields"]["prompts"] == 2


def begin_job(folder: Path) -> Job:
    return make_job(folder / "in", folder / "out", output={"rows_per_file": 10})


def test_a_new_output_goes_on_by_the_new_rules(tmp_path: Path) -> None:
    plan = resume(begin(tmp_path, rules=2))
    assert plan.fingerprint.fields["prompts"] == 2


def test_an_old_output_does_not_take_the_new_settings(tmp_path: Path) -> None:
    """What was generated took control tokens in cells for control tokens; a job that does not is another one."""
    job = begin(tmp_path, rules=1)
    changed = job.model_copy(update={"input": job.input.model_copy(update={"special_tokens": "none"})})
    with pytest.raises(OutputError, match=r'input.special_tokens: "all" -> "none"'):
        resume(changed)


def test_an_old_output_with_a_template_is_refused_in_one_line(tmp_path: Path) -> None:
    job = begin(tmp_path, rules=2, template="{{ n }}")
    plan_file = out(job, "_job/plan.json")
    record = load(plan_file)
    del record["fingerprint"]["fields"]["prompts"]
    from pipeline.planning.fingerprint import digest_of

    record["fingerprint"]["digest"] = digest_of(record["fingerprint"]["fields"])
    plan_file.write_text(json.dumps(record))
    with pytest.raises(OutputError, match="begun by an earlier version, whose templates made other prompts") as caught:
        resume(job)
    assert "\n" not in str(caught.value)


def test_a_resume_prints_the_day_on_which_the_output_was_begun(tmp_path: Path) -> None:
    """A chat template may print the date, and a resume on another day must make the same prompts."""
    job = begin(tmp_path, rules=2)
    plan_file = out(job, "_job/plan.json")
    record = load(plan_file)
    plan_file.write_text(json.dumps({**record, "created": "2026-01-31T23:59:59+00:00"}))
    assert begun_date(job) == "2026-01-31"
    plan_file.write_text(json.dumps({**record, "prompt_date": "2025-12-24"}))
    assert begun_date(job) == "2025-12-24"


def test_the_day_counts_even_if_no_row_was_saved(tmp_path: Path) -> None:
    """plan.json stays as it is then, so rows that are made now and after the next resume must print the same day."""
    job = begin(tmp_path, rules=2, rows=False)
    plan_file = out(job, "_job/plan.json")
    plan_file.write_text(json.dumps({**load(plan_file), "prompt_date": "2025-12-24"}))
    assert begun_date(job) == "2025-12-24"


def test_a_part_keeps_the_day_that_its_prompts_print(tmp_path: Path) -> None:
    """A lost plan can then be made again. Parts of jobs without a chat template have no such key."""
    talk = pa.array([[{"role": "user", "content": "hi"}]] * 2)
    write(tmp_path / "in/a.parquet", m=talk)
    job = make_job(tmp_path / "in", tmp_path / "out", input={"messages_column": "m"})
    texts = ModelTexts(chat=ChatTexts("{% for m in messages %}{{ m.content }}{% endfor %} {{ strftime_now('%d %B') }}"))
    plan = make_plan(job, checkpoint_identity="x", texts=texts, begun=Begun(date="2026-01-31"))
    ledger, store = open_ledger(job, plan), store_of(job, plan)
    data = store.input.read(plan.units[0])
    assert [row.prompt for row in data.rows] == ["hi 31 January"] * 2
    (result,) = publish(job, plan)
    ledger.complete(plan, job, result.totals, seconds=1.0)
    (part,) = out(job).glob("part-*.parquet")
    record, _ = read_part(pa.memory_map(str(part)))
    assert record.prompt_date == load(out(job, "_job/plan.json"))["prompt_date"] == "2026-01-31"
    assert not verify(job.output.path).problems


def begun_date(job: Job) -> str:
    return read_begun(job)[0].date
