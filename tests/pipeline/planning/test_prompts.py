"""Tests of what planning decides about prompts: the columns of a template, the messages of chats, and bytes as text."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from model.checkpoint.reader import BUILTIN, open_checkpoint
from pipeline.config.job import Job
from pipeline.core.errors import CheckpointError, InputError
from pipeline.input.unit_reader import UnitReader
from pipeline.output.begun import plan_job
from pipeline.planning.plan import Plan
from pipeline.planning.prompts import today
from tests.pipeline.cases import make_job, not_utf8, plan_of, reader_of, write

CHAT = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TALK = [{"role": "user", "content": "hi"}]


def job_of(folder: Path, files: list[dict[str, Any]], **settings: Any) -> Job:
    for number, columns in enumerate(files):
        write(folder / f"in/{'abc'[number]}.parquet", **columns)
    return make_job(folder / "in", folder / "out", input=settings)


def columns_of(folder: Path, template: str, *files: dict[str, Any]) -> tuple[str, ...]:
    return plan_of(job_of(folder, list(files), template=template)).prompts.columns


def refusal(folder: Path, files: list[dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(job_of(folder, files, **settings))
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "columns"),
    [
        ("{{ a }}{{ row['b c'] }}", ("b c", "a")),
        ('{{ row["b c"] }}{% for row in a %}{{ row["none"] }}{% endfor %}', ("b c", "a")),
        ("{{ row.a }}", ("a",)),
        ("{{ row | tojson }}", ("b c", "a", "d.e")),
        ("{% for k, v in row.items() %}{{ k }}{% endfor %}", ("b c", "a", "d.e")),
        ("{{ row['d' ~ '.e'] }}", ("b c", "a", "d.e")),
        ("{{ a }}{% for i in range(3) %}{{ loop.index }}{% endfor %}{% set n = namespace() %}", ("a",)),
    ],
)
def test_a_template_reads_the_columns_that_it_names(tmp_path: Path, template: str, columns: tuple[str, ...]) -> None:
    """The columns are in the order of the file. A fixed name after `row` reads one column, any other use reads all."""
    assert columns_of(tmp_path, template, {"b c": ["x"], "a": ["y"], "d.e": ["z"]}) == columns


@pytest.mark.parametrize("name", ["row", "range", "namespace", "dict"])
def test_a_column_wins_over_the_templates_own_word(tmp_path: Path, name: str) -> None:
    assert columns_of(tmp_path, "{{ a }}{{ " + name + " }}", {"a": ["x"], name: ["y"]}) == ("a", name)


def test_a_word_is_a_column_in_every_file_or_in_none(tmp_path: Path) -> None:
    said = refusal(tmp_path, [{"a": ["x"]}, {"a": ["x"], "range": [1]}], template="{{ a }}{{ range }}")
    assert said == "a.parquet: the template reads column 'range', which is not there; its columns: a"


def test_all_columns_must_be_the_same_in_every_file(tmp_path: Path) -> None:
    said = refusal(tmp_path, [{"a": ["x"]}, {"a": ["x"], "b": [1]}], template="{{ row | tojson }}")
    assert "column 'b' is not in both of a.parquet and b.parquet" in said


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ text.body }}",
            "column 'text', which is not there; column 'text.body' is written {{ row['text.body'] }}",
        ),
        ("{{ doc - id }}", "column 'doc', which is not there; column 'doc-id' is written {{ row['doc-id'] }}"),
        ("{{ nothing }}", "column 'nothing', which is not there; its columns: text.body, doc-id"),
        ("{{ row['no'] }}", "column 'no', which is not there"),
        ("{{ row['doc-id'] }}{{ loop.index }}", "the template reads `loop`: `loop` exists only inside {% for %}"),
        ("{{ row['doc-id'] }}{{ lipsum(1) }}", "the template reads `lipsum`: `lipsum` is not available"),
        ("{% for i in range(3) %}x{% endfor %}", "the template reads no column"),
    ],
)
def test_names_that_are_no_columns_are_explained(tmp_path: Path, template: str, said: str) -> None:
    assert said in refusal(tmp_path, [{"text.body": ["x"], "doc-id": [1]}], template=template)


def test_a_column_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Arrow could not send it to the process that renders, and the replica would die of that. It can be carried."""
    kind: pa.DataType = pa.int64()
    for _ in range(60):
        kind = pa.struct([("a", kind)])
    cells = pa.array([None], kind)
    said = refusal(tmp_path, [{"a": ["x"], "deep": cells}], template="{{ a }}{{ deep is none }}")
    assert said == "a.parquet: column 'deep' is nested 61 levels deep; prompts can be made of 50"
    assert plan_of(job_of(tmp_path, [{"a": ["x"], "deep": cells}], prompt_column="a", carry=["deep"])).rows == 1


def checkpoint_with(folder: Path, chat: str | None) -> Path:
    copy = Path(shutil.copytree(BUILTIN["noise"], folder / "model"))
    if chat is not None:
        (copy / "chat_template.jinja").write_text(chat)
    return copy


def chat_plan(folder: Path, chat: str | None = CHAT, cells: Any = None, **settings: Any) -> tuple[Job, Plan]:
    """Return a job with messages, and its plan with the texts of a checkpoint that has this chat template."""
    write(folder / "in/a.parquet", m=pa.array([TALK], MESSAGES) if cells is None else cells)
    checkpoint = folder / "model" if (folder / "model").exists() else checkpoint_with(folder, chat)
    job = make_job(folder / "in", folder / "out", input={"messages_column": "m", **settings})
    job = job.model_copy(update={"model": job.model.model_copy(update={"checkpoint": str(checkpoint)})})
    return job, plan_job(job, open_checkpoint(str(checkpoint)))


def test_the_chat_template_is_in_the_fingerprint(tmp_path: Path) -> None:
    """Another text of the template, or another system message, makes other prompts, so it is another job."""
    _, plan = chat_plan(tmp_path)
    assert plan.prompts.chat is not None
    assert plan.prompts.chat.date == today()
    fields = plan.fingerprint.fields
    assert (fields["chat template"], fields["input.messages_column"]) == (CHAT, "m")
    (tmp_path / "model/chat_template.jinja").write_text(CHAT + " ")
    assert chat_plan(tmp_path)[1].fingerprint.fields["chat template"] == CHAT + " "
    assert "input.system" not in fields
    assert chat_plan(tmp_path, system="Be kind.")[1].fingerprint.fields["input.system"] == "Be kind."


def test_a_job_without_messages_does_not_read_the_chat_template(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"])
    checkpoint = checkpoint_with(tmp_path, "{{ broken")
    job = make_job(tmp_path / "in", tmp_path / "out")
    assert "chat template" not in plan_job(job, open_checkpoint(str(checkpoint))).fingerprint.fields


def test_a_checkpoint_without_a_chat_template_is_answered_with_a_template(tmp_path: Path) -> None:
    """The template below the message works as it stands, and makes error rows of lists that are null or empty."""
    with pytest.raises(CheckpointError, match="has no chat template") as caught:
        chat_plan(tmp_path, None)
    job, plan = template_plan(tmp_path, f"input:\n{caught.value.advice}\n")
    (unit,) = plan.units
    reader = UnitReader(job.input, plan.prompts)
    made = [(row.prompt, row.error) for row in reader.read(unit).rows]
    reader.close()
    assert made[0] == ("user: hi\nassistant:", None)
    assert [prompt for prompt, _ in made[1:]] == [None, None]
    assert str(made[1][1]).startswith("template: column 'm' is null")


def template_plan(folder: Path, text: str) -> tuple[Job, Plan]:
    """Return a job with the template in a part of a job file, and its plan, over a good, a null and an empty list."""
    write(folder / "in/a.parquet", m=pa.array([TALK, None, []], MESSAGES))
    job = make_job(folder / "in", folder / "out", input=yaml.safe_load(text)["input"])
    return job, plan_of(job)


def test_a_broken_chat_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its chat template, line 1: unexpected"):
        chat_plan(tmp_path, "{{ ")


def test_a_prompt_column_of_messages_is_explained(tmp_path: Path) -> None:
    said = refusal(tmp_path, [{"prompt": pa.array([TALK], MESSAGES)}])
    assert "prompt column 'prompt' is list<" in said
    assert "it holds messages. Set input.messages_column if the checkpoint has a chat template" in said


@pytest.mark.parametrize("cells", [pa.array([1]), pa.array([["a"]]), pa.array([[{"role": "user"}]])])
def test_a_column_without_messages_is_refused(tmp_path: Path, cells: Any) -> None:
    with pytest.raises(InputError, match=r"messages column 'm' is .*: it must hold lists of structs with role and"):
        chat_plan(tmp_path, cells=cells)


def test_bytes_are_text_for_prompts_and_ids(tmp_path: Path) -> None:
    """Spark and Impala may write strings as bytes. A file with strings and one with bytes form one input."""
    job = job_of(
        tmp_path,
        [{"prompt": [b"a", b"\xff"], "key": [b"1", b"\xfe"]}, {"prompt": ["b"], "key": ["2"]}],
        id_column="key",
    )
    plan, reader = plan_of(job), reader_of(job)
    assert plan.schema.field("id").type == pa.string()
    [both] = [reader.read(unit) for unit in plan.units]
    assert [row.prompt for row in both.rows] == ["a", None, "b"]
    assert both.rows[1].error == "column 'prompt' holds bytes that are not UTF-8 (byte 0)"
    assert both.columns["id"].to_pylist() == ["1", "\ufffd", "2"]


def test_a_carried_column_of_bytes_stays_one(tmp_path: Path) -> None:
    job = job_of(tmp_path, [{"prompt": ["a"], "raw": [b"\xff"]}], carry=["raw"])
    (unit,) = plan_of(job).units
    assert reader_of(job).read(unit).columns["raw"].to_pylist() == [b"\xff"]


def test_an_id_that_is_not_text_makes_an_error_row(tmp_path: Path) -> None:
    job = job_of(tmp_path, [{"prompt": ["a"], "key": not_utf8(b"\xff")}], id_column="key")
    (unit,) = plan_of(job).units
    assert reader_of(job).read(unit).rows[0].error == "column 'key' holds bytes that are not UTF-8 (byte 0)"
