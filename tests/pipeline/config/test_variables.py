"""Tests of the variables in a job file: DATE is one day in the whole file, and joined paths have no double slashes."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.config.loader
from pipeline.config.loader import load_job
from pipeline.config.variables import Variables, day_of, utc_today
from pipeline.core.errors import JobError

TODAY = date(2026, 3, 1)
JOB = """\
name: night ${DATE:-yesterday}
input: {path: "/in/${DATE:-yesterday}/*.parquet", template: "As of ${DATE:-yesterday}: {{ text }}"}
output: {path: "/out/dt=${DATE:-yesterday}/"}
model: {checkpoint: "builtin:noise"}
"""


def fill(text: str, **values: str) -> str:
    return Variables(values, TODAY).fill(text, "job.yaml: key")


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("yesterday", "2026-02-28"),
        ("today", "2026-03-01"),
        ("2024-02-29", "2024-02-29"),
        ("", "2026-02-28"),  # an empty DATE means the default, as for any variable
    ],
)
def test_a_word_or_a_date_becomes_a_day(value: str, day: str) -> None:
    assert fill("in/${DATE:-yesterday}/", DATE=value) == f"in/{day}/"
    assert fill("in/${DATE:-yesterday}/") == "in/2026-02-28/"


@pytest.mark.parametrize(
    "value",
    ["tomorrow", "Yesterday", " today", "20260228", "2026-W09-6", "2026-02-30", "2026-2-3", "\uff12026-02-03", "/"],
)
def test_anything_else_is_refused_by_name(value: str) -> None:
    """If a day could be written in two ways, its data would be in two folders."""
    for text, values in (("${DATE}", {"DATE": value}), (f"${{DATE:-{value}}}", {})):
        with pytest.raises(JobError) as caught:
            fill(text, **values)
        said = f"job.yaml: key: DATE is {value!r}: give a day as YYYY-MM-DD, or today or yesterday (in UTC)"
        assert str(caught.value) == said


def test_only_date_is_a_day() -> None:
    assert fill("${UPDATE:-yesterday} ${DAY} $${DATE}", DAY="today") == "yesterday today ${DATE}"
    with pytest.raises(JobError, match="the environment variable DATE is not set"):
        fill("${DATE}")


def test_two_defaults_for_one_day_are_refused() -> None:
    """Without DATE, the two defaults would be different days; with DATE, they would be the same day."""
    variables = Variables({}, TODAY)
    variables.fill("${DATE:-yesterday}", "job.yaml: input.path")
    variables.fill("${DATE:-2026-02-28}", "job.yaml: name")  # the same day, written in another way
    said = r"output\.path: DATE is 2026-03-01, and 2026-02-28 in .*input\.path: write the same default in both"
    with pytest.raises(JobError, match=said):
        variables.fill("${DATE:-today}", "job.yaml: output.path")


@given(st.dates(min_value=date(2, 1, 1)))
def test_a_day_stays_itself_and_words_count_from_it(today: date) -> None:
    assert day_of(today.isoformat(), today) == day_of("today", today) == today.isoformat()
    assert day_of("yesterday", today) == (today - timedelta(days=1)).isoformat()


def test_a_job_has_one_day_though_midnight_passes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days: Iterator[date] = iter([TODAY, TODAY + timedelta(days=1)])
    monkeypatch.setattr(pipeline.config.loader, "utc_today", lambda: next(days))
    monkeypatch.delenv("DATE", raising=False)
    (tmp_path / "job.yaml").write_text(JOB)
    loaded = [load_job(tmp_path / "job.yaml") for _ in range(2)]
    for job, day in zip(loaded, ["2026-02-28", "2026-03-01"], strict=True):
        assert (job.name, job.input.path) == (f"night {day}", f"/in/{day}/*.parquet")
        assert (job.output.path, job.input.template) == (f"/out/dt={day}", f"As of {day}: {{{{ text }}}}")


@pytest.fixture
def set_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def set_one(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield set_one
    monkeypatch.undo()
    time.tzset()


def test_the_day_is_that_of_utc_wherever_the_machine_stands(set_zone: Callable[[str], None]) -> None:
    before = datetime.now(UTC).date()
    for zone in ("Etc/GMT+12", "Etc/GMT-14"):  # in at least one of them it is another day than in UTC
        set_zone(zone)
        assert before <= utc_today() <= datetime.now(UTC).date()


def test_a_date_in_an_override_is_the_same_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATE", "2026-01-31")
    (tmp_path / "job.yaml").write_text(JOB)
    assert load_job(tmp_path / "job.yaml", ["output.path=/other/${DATE}"]).output.path == "/other/2026-01-31"
    monkeypatch.setenv("DATE", "x")
    overrides = ["name=n", "input.path=/in", "input.template=null", "output.path=/${DATE}"]
    with pytest.raises(JobError, match=r"job\.yaml: --set output\.path: DATE is 'x': give a day"):
        load_job(tmp_path / "job.yaml", overrides)


@pytest.mark.parametrize("value", ["s3://bucket/in", "s3://bucket/in/"])
def test_a_path_has_one_slash_where_a_value_ends(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an object store, `in//x` is another folder than `in/x`. Text that is no path is left as it is."""
    monkeypatch.setenv("TT_IN", value)
    text = JOB.replace("/in/${DATE:-yesterday}/*.parquet", "${TT_IN}/x//y/").replace("/out/", "${TT_IN}")
    (tmp_path / "job.yaml").write_text(text.replace("As of", "${TT_IN}/"))
    job = load_job(tmp_path / "job.yaml")
    assert job.input.path == "s3://bucket/in/x//y/"
    assert job.output.path.startswith(f"{value}dt=")
    assert (job.input.template or "").startswith(f"{value}/ ")
