"""Tests of the report of a job: it is a whole page at any time, reads a bounded part of the output, and any text is
safe in it."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.job import Job
from pipeline.core.events import EngineRoom, ReplicaStats
from pipeline.core.types import RowResult
from pipeline.maintenance.verify import verify
from pipeline.monitoring.live import Live, LiveReplica
from pipeline.output.layout import LIVE
from pipeline.output.ledger import read_status
from pipeline.output.part import result_table
from pipeline.output.records import RECORD_KEY, read_part, to_json
from pipeline.output.unit_store import UnitStore
from pipeline.report import rows
from pipeline.report.facts import read_facts
from pipeline.report.html import make_html
from pipeline.report.rows import read_errors, read_sample
from pipeline.report.summary import read_report
from pipeline.report.terminal import lines
from pipeline.report.write import report_line, write_report
from pipeline.storage.storage import Storage
from tests.pipeline.calibration.test_page import Page
from tests.pipeline.cases import complete_row, make_job, open_ledger, out, plan_of, prompts, publish, reader_of, write
from tests.pipeline.cases import run as run_job

HOSTILE = "<script>alert(1)</script></table>\x1b[31m\u202e{{ 7 * 7 }} &amp; \"x' \ue000"


def small_job(folder: Path, **sections: Any) -> Job:
    write(folder / "in/a.parquet", prompt=[*prompts(19), None])
    return make_job(folder / "in", folder / "out", output={"rows_per_file": 10}, **sections)


def said(page: Page) -> str:
    return " ".join(" ".join(page.texts).split())


def page_of(job: Job) -> str:
    write_report(job.output.path)
    return out(job, "_job/report.html").read_text()


def test_a_complete_job_has_a_page_that_fetches_and_runs_nothing(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    run_job(job)
    page = Page(text := page_of(job))
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "image", "a"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes), tag
    assert "url(" not in text
    assert "@import" not in text
    words = said(page)
    assert words.index("Complete, finished ") < words.index("Throughput") < words.index("Distributions")
    for part in (
        "20 rows, 19 ok, 1 error.",
        "From all 19 rows without errors",
        "replica-0",
        read_status(str(out(job))).fingerprint,
    ):
        assert part in words
    assert verify(str(out(job))).problems == ()


def test_a_job_under_way_is_said_not_to_be_complete_and_an_empty_one_has_a_page_too(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    plan = plan_of(job)
    open_ledger(job, plan)
    empty = Page(page_of(job))
    assert empty.open == []
    assert "Not complete: 0 of 20 rows (0%)" in said(empty)
    assert "Throughput" not in said(empty)
    publish(job, plan, plan.units[:1])
    assert "Not complete: 10 of 20 rows (50.00%)" in said(Page(page_of(job)))
    assert any("Not complete" in line for line in lines(read_report(job.output.path)))


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path) -> None:
    """Such texts are in replica names, in the job's settings and in errors. They are safe on the page and on the
    terminal."""
    write(tmp_path / "in/<b>.parquet", prompt=[None, *prompts(3)])
    job = make_job(tmp_path / "in", tmp_path / "out", input={"carry": []})
    job = job.model_copy(update={"name": HOSTILE})
    plan = plan_of(job)
    open_ledger(job, plan)
    data = reader_of(job).read(plan.units[0])
    store = UnitStore(job, plan.fingerprint.digest, plan.schema, plan.prompts, HOSTILE)
    results: list[RowResult] = [complete_row(row) for row in data.rows]
    results[0] = replace(results[0], completion=replace(results[0].completion, error=f"row is bad: {HOSTILE}"))
    table = result_table(data.unit, results)
    store.publish(data.unit, store.make_part(data, [table], writer="0" * 32, attempt=1, seconds=1.0))
    page = Page(text := page_of(job))
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    for shown in (text, "\n".join(lines(read_report(job.output.path)))):
        assert "row is bad" in shown
        assert "49" not in re.sub(r'="[^"]*"', "", shown[shown.index("row is bad") :])[:400]
        assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ue000]", shown)


def test_a_report_reads_a_bounded_part_of_a_large_output_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(60))
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 5})
    run_job(job)
    opened: list[str] = []
    whole = Storage.open

    def noted(self: Storage, name: str, size: int) -> pa.NativeFile:
        opened.append(name)
        return whole(self, name, size)

    monkeypatch.setattr(Storage, "open", noted)
    units = read_facts(job.output.path).units
    monkeypatch.setattr(rows, "PARTS_READ", 4)
    opened.clear()
    sample = read_sample(Storage(job.output.path), units)
    assert (sample.parts, sample.of_parts, sample.rows, len(opened)) == (4, 12, 20, 4)
    monkeypatch.setattr(rows, "ROWS_READ", 12)
    assert read_sample(Storage(job.output.path), units).parts == 2
    assert "From 10 of the 60 rows without errors: one row group per part, from 2 of 12 parts, drawn" in said(
        Page(page_of(job))
    )
    # the same parts are drawn each time
    assert page_of(job).split("report written")[0] == page_of(job).split("report written")[0]


def test_error_rows_are_counted_by_kind_with_an_example(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=[None, "x", None, "", *prompts(6)])
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 5})
    run_job(job)
    facts = read_facts(job.output.path)
    errors = read_errors(Storage(job.output.path), facts.units)
    assert (errors.parts, errors.of_parts, sum(kind.rows for kind in errors.kinds)) == (1, 1, 3)
    assert errors.kinds[0].rows == 2
    assert errors.kinds[0].example.startswith("a.parquet#0: ")
    words = said(Page(page_of(job)))
    assert "3 of 10 rows failed (30.00%)" in words
    assert errors.kinds[0].example in words


def test_the_statistics_are_those_of_the_rows(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    run_job(job)
    sample = read_sample(Storage(job.output.path), read_facts(job.output.path).units)
    assert sample.rows == 19
    assert set(sample.values["tokens_per_forward"]) == {1.5}
    assert sorted(sample.values["prompt_tokens"]) == sorted(len(text) for text in prompts(19))
    assert sample.steps.tolist()[:4] == [0, 0, 19, 0]


def test_damaged_parts_are_left_out_and_named(tmp_path: Path) -> None:
    """The footer of one part is broken. Another part has broken data, which its footer does not show."""
    write(tmp_path / "in/a.parquet", prompt=prompts(30))
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 10})
    run_job(job)
    first, second, _ = sorted(out(job).glob("part-*.parquet"))
    first.write_bytes(first.read_bytes()[:-5])
    data = bytearray(second.read_bytes())
    pages = (len(data) - 8 - int.from_bytes(data[-8:-4], "little")) // 2
    data[4:pages] = bytes(reversed(data[4:pages]))
    second.write_bytes(data)
    words = said(Page(page_of(job)))
    assert "Left out: 1 part (broken, or of another job). To see which, run twotower verify" in words
    assert "Left out of the distributions: 1 part that cannot be read" in words
    assert "Not complete: 20 of 30 rows" in words


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path, bytes]:
    """Make a complete job. Return it with one of its parts and the content of this part."""
    job = small_job(tmp_path_factory.mktemp("whole"))
    run_job(job)
    part = min(out(job).glob("part-*.parquet"))
    return job, part, part.read_bytes()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 10**6), bits=st.integers(1, 255), cut=st.booleans())
def test_whatever_is_damaged_in_a_part_there_is_a_page(
    whole: tuple[Job, Path, bytes], at: int, bits: int, cut: bool
) -> None:
    job, part, data = whole
    at %= len(data)
    part.write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :])
    report = read_report(job.output.path)
    assert Page(make_html(report).decode()).open == []


def test_parts_of_earlier_versions_have_a_report_without_their_times(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    run_job(job)
    [part, _] = sorted(out(job).glob("part-*.parquet"))
    table = pq.read_table(part)
    record = json.loads((table.schema.metadata or {})[RECORD_KEY.encode()])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", record.pop("published"))
    metadata = {**(table.schema.metadata or {}), RECORD_KEY.encode(): json.dumps(record).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), part)
    assert read_part(pa.OSFile(str(part), "rb"))[0].published == ""
    words = said(Page(page_of(job)))
    assert "Left out here: 1 unit of an earlier version" in words
    assert "Complete" in words


def test_what_the_driver_said_last_is_there(tmp_path: Path) -> None:
    """Padding and retries are in no part. They are those of the last run, as live.json has them."""
    job = small_job(tmp_path)
    plan, *_ = run_job(job)
    assert "The last run" not in said(Page(page_of(job)))
    room = EngineRoom(prefill_tokens=75, padded_tokens=100, preemptions=7)
    nothing: dict[str, Any] = dict.fromkeys(LiveReplica.__dataclass_fields__, 0)
    replica = LiveReplica(**{**nothing, "name": "r0", "doing": "", "stats": ReplicaStats(room=room)})
    told: dict[str, Any] = dict.fromkeys(Live.__dataclass_fields__, 0)
    told |= {"fingerprint": plan.fingerprint.digest, "ended": HOSTILE, "losses": ["out of memory"], "error_kinds": []}
    told |= {"replicas": [replica], "replicas_lost": 3, "unit_retries": 11, "left_out": [], "boot": ""}
    live = Live(**told)
    Storage(job.output.path).write(LIVE, to_json(asdict(live)))
    words = said(page := Page(page_of(job)))
    assert page.open == []
    assert "padding, as a share of the tokens in prefill forwards 25.00%" in words
    assert "units put back into the queue 11 replicas lost 3 a lost replica out of memory" in words


def test_a_report_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path)
    run_job(job)
    out(job, "_job/report.html").mkdir()
    assert report_line(job.output.path).startswith("not written: cannot write ")
    out(job, "_job/report.html").rmdir()
    assert report_line(job.output.path) == f"{job.output.path}/_job/report.html"
    monkeypatch.setattr("pipeline.report.write.make_html", lambda _: 1 / 0)
    assert report_line(job.output.path) == "not written: ZeroDivisionError: division by zero"


def test_the_command_writes_the_page_or_shows_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path)
    run_job(job)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["report", job.output.path, *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    shown = call("--terminal")
    assert not out(job, "_job/report.html").exists()
    assert "Complete" in shown.splitlines()[0]
    assert re.search(r"batch rows .* [▁▂▃▄▅▆▇█]", shown)
    assert max(map(len, shown.splitlines())) < 300
    written = [call(), call("--to", "mine.html"), call("--to", "."), call("--to", f"{tmp_path}/new/")]
    assert written[1:] == [f"{tmp_path}/{name}" for name in ("mine.html", "report.html", "new/report.html")]
    assert all(Path(path).read_text().startswith("<!doctype html>") for path in written)
    assert CliRunner().invoke(app, ["report", job.output.path, "--to", " "]).exit_code == 1
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 1
