"""Tests of the command `show`: what it prints, and its exit codes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli.app import app
from tests.pipeline.cases import make_job, open_ledger, plan_of, prompts, publish, run, write


def call(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["show", *map(str, arguments)])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a job over ten rows, two of which have no prompt, with the prompts kept."""
    folder = tmp_path_factory.mktemp("show")
    texts: list[str | None] = [*prompts(10)]
    texts[0], texts[9] = None, "\x1b[31mred\u202e\nAnswer: "
    texts[4] = ""
    write(folder / "in/a.parquet", prompt=texts, lang=["en", "de"] * 5)
    job = make_job(
        folder / "in", folder / "out", input={"carry": ["lang"]}, output={"rows_per_file": 4, "keep_prompt": True}
    )
    run(job)
    return folder / "out"


def test_the_first_five_rows_are_shown(out: Path) -> None:
    shown = call(out)
    assert shown.exit_code == 0, shown.output
    *rows, more = shown.stdout.rstrip("\n").split("\n\n")
    assert [row.split()[0] for row in rows] == [f"a.parquet#{row}" for row in range(5)]
    assert more == "-n 10 shows more"
    assert rows[0].splitlines() == [
        "a.parquet#0  error",
        "  lang    en",
        "  prompt  null",
        "  error   prompt is null",
    ]
    assert rows[1].splitlines() == [
        "a.parquet#1  length",
        "  lang        de",
        "  prompt      prompt 1",
        "  completion  answer to prompt 1",
        "  stats       3 tokens, 2 forwards, 1.5 tokens/forward, 0.5 s, attempt 1",
    ]


def test_options_choose_the_rows(out: Path) -> None:
    def ids(*options: str) -> list[str]:
        lines = call(out, *options).stdout.splitlines()
        return [line.split()[0].partition("#")[2] for line in lines if line.startswith("a.parquet#")]

    assert ids("-n", "2") == ["0", "1"]
    assert ids("--errors") == ["0", "4"]
    assert ids("--errors", "-n", "1") == ["0"]
    assert ids("--where", "lang=de", "--where", "finish_reason=length") == ["1", "7", "9"]
    assert ids("-n", "100") == [*"0123456789"]


def test_what_a_text_holds_does_not_reach_the_terminal(out: Path) -> None:
    for option in ("--errors", "--full", "-n9"):
        assert not {"\x1b", "\u202e"} & set(call(out, option, "--where", "source_row=9").output)
    lines = call(out, "--full", "--where", "source_row=9").stdout.splitlines()
    assert lines[2:4] == [r"  prompt      \x1b[31mred\u202e⏎", r"              Answer:\x20"]


def test_the_width_is_that_of_the_terminal(out: Path) -> None:
    narrow = call(out, "--where", "source_row=1", columns=44).stdout.splitlines()
    assert max(map(len, narrow)) <= 44
    assert len(narrow) == len(call(out, "--where", "source_row=1").stdout.splitlines()) + 2


def test_where_nothing_matches_it_says_what_was_looked_at(tmp_path: Path, out: Path) -> None:
    nothing = call(out, "--where", "lang=fr")
    assert (nothing.exit_code, nothing.stdout) == (0, "no row matches: 10 of 10 rows are published\n")
    write(tmp_path / "in/a.parquet", prompt=prompts(10))
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 4})
    plan = plan_of(job)
    open_ledger(job, plan)
    empty = call(job.output.path)
    assert (empty.exit_code, empty.stdout) == (0, "there is no row yet: 0 of 10 rows are published\n")
    publish(job, plan, plan.units[1:2])
    assert call(job.output.path, "--errors").stdout == "no row matches: 3 of 10 rows are published\n"
    assert call(job.output.path, "-n", "1").stdout.startswith("a.parquet#3  stop\n  completion  answer to prompt 3\n")


@pytest.mark.parametrize("options", [["-n", "0"], ["-n", "-3"], ["-n", "x"], ["--where", "lang"], ["--where", ""]])
def test_wrong_usage_exits_with_2(out: Path, options: list[str]) -> None:
    assert call(out, *options).exit_code == 2
    assert call("").exit_code == 2


def test_errors_are_one_line(tmp_path: Path, out: Path) -> None:
    for arguments, said in (
        ((tmp_path,), f"error: output {tmp_path} is not a job's output: it has no _job/plan.json"),
        ((out, "--where", "attempt=x"), "error: --where attempt=x: the column holds int32, and x is no such value"),
        ((out, "--where", "no=x"), "error: --where: the output has no column 'no'; its columns: id, lang, prompt, "),
    ):
        failed = call(*arguments)
        assert failed.exit_code == 1
        [line] = failed.stderr.splitlines()
        assert line.startswith(said)
