"""Tests of what `plan` shows of prompts: some of them, the reasons why rows have none, and whether `run` would fail."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from pipeline.cli.app import app
from pipeline.cli.plan_sample import sample_plan
from pipeline.output.begun import OLD_RULES_NOTE, plan_job
from pipeline.planning.checkpoint import check_checkpoint, load_tokenizer
from tests.pipeline.cases import make_job, write

JOB = """
name: shown
input: {{path: {folder}/in, {settings}}}
output: {{path: {folder}/out}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation: {{max_new_tokens: 8}}
"""


def plan(folder: Path, settings: str, *arguments: str, **columns: Any) -> Result:
    write(folder / "in/a.parquet", **columns)
    (folder / "job.yaml").write_text(JOB.format(folder=folder, settings=settings))
    return CliRunner().invoke(app, ["plan", str(folder / "job.yaml"), *arguments])


def lines_of(result: Result, *heads: str) -> list[str]:
    """Return the lines that begin with one of these words, with the indented lines below them."""
    taken, found = False, []
    for line in result.stdout.splitlines():
        taken = line.startswith(heads) or (taken and line.startswith("   "))
        found += [line] if taken else []
    return found


def test_the_shortest_the_median_and_the_longest_prompt_are_shown(tmp_path: Path) -> None:
    result = plan(tmp_path, "prompt_column: p", p=["abc", "a", "abcde", "ab", "abcd"])
    assert lines_of(result, "shortest", "median", "longest") == [
        "shortest   a.parquet#1, 1 token:",
        "           a",
        "median     a.parquet#0, 3 tokens:",
        "           abc",
        "longest    a.parquet#2, 5 tokens:",
        "           abcde",
    ]


@pytest.mark.parametrize(("prompts", "heads"), [(["a"], ["only"]), (["a", "bc"], ["shortest", "longest"])])
def test_a_prompt_is_not_shown_twice(tmp_path: Path, prompts: list[str], heads: list[str]) -> None:
    lines = lines_of(plan(tmp_path, "prompt_column: p", p=prompts), "shortest", "median", "longest", "only")
    assert [line.split()[0] for line in lines if line[0] != " "] == heads


def test_everything_in_a_prompt_is_visible_and_fits_a_terminal(tmp_path: Path) -> None:
    """A control character must not reach the terminal, and no line is wider than 80 columns. A long text keeps its
    beginning and its end. Control tokens of the template are counted, those that a cell spells are not."""
    text = "<eos>\x1b[31mred\n" + "x" * 5000 + "the end \n"
    result = plan(tmp_path, "template: '{{ p }}<eos>'", p=[text])
    shown = lines_of(result, "only")
    assert shown[0] == f"only       a.parquet#0, {len(text) + 1:,} tokens with 1 control token:"
    prompt = "".join(line.removeprefix("           ") for line in shown[1:])
    assert prompt.startswith("<eos>\\x1b[31mred⏎xxx")
    assert prompt.endswith("xthe end ⏎⟦<eos>⟧")
    assert " … " in prompt
    assert "\x1b" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if line.startswith("   "))


def test_wide_characters_count_as_two_columns(tmp_path: Path) -> None:
    shown = lines_of(plan(tmp_path, "prompt_column: p", p=["漢" * 60]), "only")
    assert [len(line.strip()) for line in shown[1:]] == [34, 26]


def test_reasons_are_counted_with_an_example_each(tmp_path: Path) -> None:
    """The exit code is 1 if there are more such rows than retry.max_error_rate allows, and then stderr says so."""
    settings = "template: '{{ t }}: {{ 10 // n }}'"
    columns: dict[str, Any] = {"t": ["a", None, "b", None, "c"], "n": [1, 1, 0, 1, 1]}
    result = plan(tmp_path, settings, **columns)
    assert lines_of(result, "bad rows") == [
        "bad rows   3 of 5 sampled rows have no usable prompt:",
        "           2 rows, the first a.parquet#1: template: column 't' is null: give it ",
        "           a default in the template, or set input.nulls: empty",
        "           1 row, the first a.parquet#2: template: integer division or modulo ",
        "           by zero",
        "           above retry.max_error_rate 0.1: `run` would end with an error",
    ]
    assert result.exit_code == 1
    said = "3 of 5 sampled rows cannot be generated, 60%, above retry.max_error_rate 0.1: `run` would end with an error"
    assert f"error: {said}" in result.stderr
    allowed = plan(tmp_path, settings, "--set", "retry.max_error_rate=0.6", **columns)
    assert (allowed.exit_code, allowed.stderr) == (0, "")


def test_the_columns_of_a_template_are_named(tmp_path: Path) -> None:
    columns = {"a": ["x"], "b c": ["y"], "range": [1]}
    assert lines_of(plan(tmp_path, "template: '{{ a }}'", **columns), "columns") == ["columns    the template reads a"]
    assert lines_of(plan(tmp_path, "template: '{{ a }}{{ range }}'", **columns), "columns") == [
        "columns    the template reads a, range; `range` is a column here, not the template's own word"
    ]
    assert lines_of(plan(tmp_path, "template: '{{ row | tojson }}'", **columns), "columns") == [
        "columns    the template reads all 3 columns, because it uses `row` without a fixed name"
    ]


def test_a_prompt_of_a_thousand_pages_is_not_kept_whole(tmp_path: Path) -> None:
    """The sample holds hundreds of rows, so only the ends of their prompts stay in memory."""
    write(tmp_path / "in/a.parquet", prompt=pa.array(["x" * 1_000_000]))
    job = make_job(tmp_path / "in", tmp_path / "out")
    checkpoint = check_checkpoint(job)
    sample = sample_plan(job, plan_job(job, checkpoint), load_tokenizer(checkpoint), 2_000_000)
    assert [len(prompt.text) for _, prompt in sample.prompts] == [4000]


def test_an_output_of_an_earlier_version_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.output import begun
    from pipeline.planning.packing import StoredUnits
    from pipeline.planning.prompts import Begun

    monkeypatch.setattr(begun, "read_begun", lambda _: (Begun(rules=1), StoredUnits()))
    assert lines_of(plan(tmp_path, "prompt_column: p", p=["a"]), "note") == [f"note       {OLD_RULES_NOTE}"]
