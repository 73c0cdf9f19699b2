"""Runs every example of docs/analyse.md unchanged, and compares its answers with plain Python over the rows."""

import importlib.util
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from pipeline.core.repetition import DEGENERATE
from tests.docs.conftest import BAD_ROWS

pytestmark = [pytest.mark.server, pytest.mark.slow]

TEXT = (Path(__file__).parents[2] / "docs/analyse.md").read_text()
LANGUAGES = {"sql", "python"}


@dataclass(frozen=True)
class Example:
    heading: str
    language: str
    code: str
    number: int
    """Position among the examples of its heading, from 1."""


def examples() -> list[Example]:
    """Return the fenced blocks of the page, in order."""
    found: list[Example] = []
    for section in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        found += [Example(heading, language, code, number) for number, (language, code) in enumerate(blocks, 1)]
    return found


EXAMPLES = examples()
VIEW = next(example.code for example in EXAMPLES if example.language == "sql")


def named(example: Example) -> str:
    return f"{example.heading}-{example.number}"


@dataclass(frozen=True)
class Truth:
    """The output as plain rows in input order, and the prompts of the input."""

    folder: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        parts = sorted((self.folder / "out/demo").glob("part-*.parquet"))
        return [row for part in parts for row in pq.read_table(part).to_pylist()]

    @cached_property
    def good(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["finish_reason"] != "error"]

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Return the prompts by id."""
        rows = pq.read_table(self.folder / "jobs/demo_prompts.parquet").to_pylist()
        return {row["id"]: row["prompt"] for row in rows}

    @cached_property
    def steps(self) -> Counter[int]:
        return Counter(steps for row in self.rows for steps in row["steps_per_block"])

    def tokens_per_forward(self, reason: str) -> float:
        rows = [row for row in self.rows if row["finish_reason"] == reason]
        tokens: int = sum(row["completion_tokens"] for row in rows)
        forwards: int = sum(row["denoiser_forwards"] for row in rows)
        return tokens / forwards


@pytest.fixture(scope="module")
def truth(demo: Path) -> Truth:
    return Truth(demo)


def test_every_block_is_run() -> None:
    """Every example is in a language that the tests can run, and every link inside the page leads somewhere."""
    assert {example.language for example in EXAMPLES} == LANGUAGES
    assert TEXT.count("```") == 2 * len(EXAMPLES) > 50
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


# The checks of the answers to the queries, by heading in ANSWERS.


def tokens_per_forward(rows: list[dict[str, Any]], truth: Truth) -> None:
    found = {row["finish_reason"]: row for row in rows}
    assert found.keys() == {"error", "length", "stop"}
    assert found["error"]["tokens_per_forward"] is None
    assert found["stop"]["tokens_per_forward"] == pytest.approx(truth.tokens_per_forward("stop"))
    assert sum(row["rows"] for row in rows) == len(truth.rows)


def errors(rows: list[dict[str, Any]], _truth: Truth) -> None:
    assert rows == [{"kind": "prompt is null", "rows": BAD_ROWS, "examples": ["bad-0", "bad-1", "bad-2"]}]


def degenerate(rows: list[dict[str, Any]], truth: Truth) -> None:
    (row,) = rows
    share = sum(row["repetition"] >= DEGENERATE for row in truth.good) / len(truth.good)
    assert 0 < row["degenerate_share"] == pytest.approx(share)
    assert row["worst"].startswith("la la la")


def prompts_beside(rows: list[dict[str, Any]], truth: Truth) -> None:
    completions = {row["id"]: row["completion"] for row in truth.rows}
    assert len(rows) == 5
    for row in rows:
        assert (row["prompt"], row["completion"]) == (truth.prompts[row["id"]], completions[row["id"]])


def steps_per_block(rows: list[dict[str, Any]], truth: Truth) -> None:
    assert {row["steps"]: row["blocks"] for row in rows} == truth.steps
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def one_input_file(rows: list[dict[str, Any]], truth: Truth) -> None:
    assert [row["id"] for row in rows] == [row["id"] for row in truth.rows[100:200]]


def latency(rows: list[dict[str, Any]], truth: Truth) -> None:
    (row,) = rows
    assert (row["replica"], row["rows"]) == ("local-1", len(truth.good))
    in_slot = [row["latency_s"] - row["queue_s"] for row in truth.good]
    assert row["seconds_in_a_slot"][0] == pytest.approx(statistics.median(in_slot))
    assert row["seconds_in_a_slot"] == sorted(row["seconds_in_a_slot"])


def throughput(rows: list[dict[str, Any]], truth: Truth) -> None:
    assert {row["replica"] for row in rows} == {"local-1"}
    assert sum(row["rows"] for row in rows) == len(truth.rows)
    tokens = sum(row["completion_tokens"] for row in truth.rows)
    assert 3600 * sum(row["tokens_per_s"] for row in rows) == pytest.approx(tokens)


def a_sample(rows: list[dict[str, Any]], truth: Truth) -> None:
    assert len({row["id"] for row in rows}) == 10
    numbers = {row["id"]: row["source_row"] for row in truth.good}
    assert len({numbers[row["id"]] // 50 for row in rows}) > 3  # from several parts


def without_repeats(_rows: object, truth: Truth) -> None:
    kept = [row for file in (truth.folder / "out/unique").iterdir() for row in pq.read_table(file).to_pylist()]
    first: dict[str, str] = {}
    for row in truth.good:
        if row["repetition"] < DEGENERATE:
            first.setdefault(row["completion"], row["id"])
    assert {row["completion"]: row["id"] for row in kept} == first
    assert len(kept) == len(first) < len(truth.good)


ANSWERS: dict[str, Callable[[list[dict[str, Any]], Truth], None]] = {
    "Tokens per forward": tokens_per_forward,
    "Errors": errors,
    "Degenerate completions": degenerate,
    "Back to the prompts by id": prompts_beside,
    "Back to the prompts by file and row": prompts_beside,
    "Steps per block": steps_per_block,
    "One input file": one_input_file,
    "Latency": latency,
    "Throughput by replica and hour": throughput,
    "A sample": a_sample,
    "Without repeats": without_repeats,
}


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.language == "sql" and e.code != VIEW], ids=named)
def test_a_query(example: Example, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(truth.folder)
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        connection.execute(VIEW)
        done = connection.execute(example.code)
        names = [column[0] for column in done.description or ()]
        rows = [dict(zip(names, row, strict=True)) for row in done.fetchall()]
    ANSWERS[example.heading](rows, truth)


def run(example: Example, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a Python example in a folder and return its variables."""
    monkeypatch.chdir(folder)
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(folder / "cache"))
    # Otherwise `datasets` would import torch, which is slow, and draw progress bars.
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "USE_TORCH": "0"}.items():
        monkeypatch.setenv(name, value)
    variables: dict[str, Any] = {}
    exec(compile(example.code, named(example), "exec"), variables)
    return variables


def pandas_by_reason(found: dict[str, Any], truth: Truth) -> None:
    by_reason = found["by_reason"]
    assert by_reason.loc["length", "tokens_per_forward"] == pytest.approx(truth.tokens_per_forward("length"))


def pandas_dates(found: dict[str, Any], truth: Truth) -> None:
    assert set(found["rows"].id) == {row["id"] for row in truth.rows if row["task"] == "date"}


def polars_by_reason(found: dict[str, Any], truth: Truth) -> None:
    by_reason = {row["finish_reason"]: row for row in found["by_reason"].to_dicts()}
    assert by_reason["stop"]["tokens_per_forward"] == pytest.approx(truth.tokens_per_forward("stop"))
    assert by_reason["error"]["rows"] == BAD_ROWS


def polars_steps(found: dict[str, Any], truth: Truth) -> None:
    assert dict(found["steps"].iter_rows()) == truth.steps
    assert dict(found["beside"].select("id", "prompt").iter_rows()) == truth.prompts


def pyarrow_tokens(found: dict[str, Any], truth: Truth) -> None:
    assert found["tokens"] / found["forwards"] == pytest.approx(truth.tokens_per_forward("stop"))


def pyarrow_totals(found: dict[str, Any], truth: Truth) -> None:
    assert len(found["totals"]) > 10
    assert sum(part["rows"] for part in found["totals"]) == len(truth.rows)
    assert sum(part["errors"] for part in found["totals"]) == BAD_ROWS


def hugging_face(found: dict[str, Any], truth: Truth) -> None:
    assert found["rows"].num_rows == len(truth.rows)
    good = [row["id"] for row in truth.good if row["finish_reason"] == "stop" and row["repetition"] < DEGENERATE]
    assert sorted(found["good"]["id"]) == sorted(good)


def hugging_face_stream(found: dict[str, Any], truth: Truth) -> None:
    assert found["row"]["completion"] in {row["completion"] for row in truth.rows}


def nothing_more(_found: dict[str, Any], _truth: Truth) -> None:
    pass


PYTHON: dict[str, Callable[[dict[str, Any], Truth], None]] = {
    "pandas-1": pandas_by_reason,
    "pandas-2": pandas_dates,
    "Polars-1": polars_by_reason,
    "Polars-2": polars_steps,
    "pyarrow-1": pyarrow_tokens,
    "pyarrow-2": pyarrow_totals,
    "Hugging Face datasets-1": hugging_face,
    "Hugging Face datasets-2": hugging_face_stream,
    "Spark-1": nothing_more,
}
ON_S3 = "On S3"


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.language == "python" and e.heading != ON_S3], ids=named)
def test_a_python_example(
    example: Example, truth: Truth, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if example.heading == "Spark" and not (shutil.which("java") and importlib.util.find_spec("pyspark")):
        pytest.skip("neither Java nor pyspark comes with the project: see the end of docs/analyse.md")
    found = run(example, truth.folder, monkeypatch)
    PYTHON[named(example)](found, truth)
    assert capsys.readouterr().out.strip()


S3_SAYS = {
    1: rf"error +{BAD_ROWS}$",
    2: rf"error +│ +{BAD_ROWS} ",
    3: f"^{BAD_ROWS}$",
    4: r"^\w+-0000$",
    5: rf"error +┆ {BAD_ROWS} ",
}
"""A pattern of what each example prints, by its number."""


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.heading == ON_S3], ids=named)
def test_an_example_on_s3(
    example: Example,
    truth: Truth,
    bucket: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The examples work if only the environment has the credentials."""
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    run(example, truth.folder, monkeypatch)
    printed = capsys.readouterr().out
    assert re.search(S3_SAYS[example.number], printed, re.MULTILINE), printed
