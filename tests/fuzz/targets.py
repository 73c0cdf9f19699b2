"""Defines the fuzz targets: functions of untrusted bytes, which may raise only the project's own errors.

The coverage-guided fuzzer (tests.fuzz.run) and hypothesis (tests/pipeline/input/test_untrusted.py) run the targets;
both start from the seeds of a target.
"""

import io
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.loader import load_job
from pipeline.core.errors import InputError, JobError, TwoTowerError
from pipeline.core.types import Row
from pipeline.input import limits
from pipeline.output.claim import read_driver
from pipeline.output.job_records import PlanRecord, plan_fields
from pipeline.output.part import result_table
from pipeline.output.records import CommitRecord, NotOursError, read_part, to_json
from pipeline.output.segments import from_segment, segment_name, to_segment
from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.template import resolve_columns, template_names
from tests.pipeline.cases import complete_row, make_job, one_piece, part_of, plan_of, publish, reader_of

UNIT = one_piece("0123456789ab-0000000000", "/in/a.parquet", "a.parquet", 0, 4, 100, "mtime:1")
DIGEST = "d" * 64
ROWS_AT_MOST = 100_000
"""Number of rows after which reading an input stops: a mutated file may claim any number of rows and still be valid."""


@dataclass(frozen=True)
class Target:
    """A reader under test."""

    run: Callable[[bytes], None]
    """Raises an exception if the reader does what it must not."""
    seeds: Callable[[], list[bytes]]
    """Returns small inputs from which mutations start."""


@cache
def folder() -> Path:
    """Return the folder for the files that targets read; it is removed when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="twotower-fuzz-")
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list["tempfile.TemporaryDirectory[str]"] = []


def check_line(error: Exception, longest: int = 2_000) -> None:
    """Check that the error is one line that can be printed."""
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) <= longest
    text.encode()


def run_job(data: bytes) -> None:
    """Load a job file."""
    file = folder() / "job.yaml"
    file.write_bytes(data)
    try:
        load_job(file)
    except JobError as error:
        check_line(error)


def run_template(data: bytes) -> None:
    """Compile a template, as the driver does."""
    try:
        names = template_names(data.decode("utf-8", "replace"))
    except ValueError as error:
        check_line(error)
    else:
        assert names.free


def run_prompt(data: bytes) -> None:
    """Render a template with a cell as a replica does; a NUL in `data` divides the two."""
    text, _, cell = data.decode("utf-8", "replace").partition("\0")
    try:
        names = template_names(text)
        columns = resolve_columns(text, sorted(names.free | names.row_keys))
    except ValueError:
        return
    maker = PromptMaker(PromptSetup(columns, text, control_tokens=("<eos>", "<mask>")))
    try:
        made = list(maker.make(pa.table({name: [cell, None] for name in columns})))
    except InputError as error:
        check_line(error)
        return
    finally:
        maker.close()
    assert len(made) == 2
    for prompt, reason in made:
        assert (prompt is None) != (reason is None)
        (prompt.text if prompt is not None else reason or "").encode()
        assert "\n" not in (reason or "")


def run_plan(data: bytes) -> None:
    """Read a plan.json."""
    _only_not_ours(lambda: PlanRecord.read(data))


def run_record(data: bytes) -> None:
    """Read the commit record of a unit."""
    _only_not_ours(lambda: CommitRecord.read(data))


def run_driver(data: bytes) -> None:
    """Read the claim of a driver."""
    read_driver(data)


def run_part(data: bytes) -> None:
    """Read the footer of a part."""
    _only_not_ours(lambda: read_part(pa.BufferReader(data)))


def run_segment(data: bytes) -> None:
    """Read a segment with a checksum that fits, as a foreign writer could make it."""

    def read() -> None:
        table = from_segment(segment_name("0" * 32, 1, data), data, UNIT, DIGEST)
        table.validate(full=True)
        assert set(table["source_row"].to_pylist()) <= set(range(UNIT.row_count))

    _only_not_ours(read)


def run_input(data: bytes) -> None:
    """Plan an input file, and read its units up to about ROWS_AT_MOST rows."""
    file = folder() / "input.parquet"
    file.write_bytes(data)
    job = make_job(
        file, folder() / "out", input={"id_column": "n", "carry": ["tags", "word"]}, output={"rows_per_file": 3}
    )
    reader = reader_of(job)
    closer_look = patch.object(limits, "SURELY_BYTES", 0)  # examines row groups even if they are small
    try:
        closer_look.start()
        plan = plan_of(job)
        rows = 0
        for unit in plan.units:
            with suppress(InputError):
                read = reader.read(unit)
                assert len(read.rows) == unit.row_count == read.columns.num_rows
                read.columns.validate(full=True)
            rows += unit.row_count
            if rows > ROWS_AT_MOST:
                break
    except TwoTowerError as error:
        check_line(error, 20_000)
    finally:
        closer_look.stop()
        reader.close()


def _only_not_ours(read: Callable[[], object]) -> None:
    with suppress(NotOursError):
        read()


def _job_seeds() -> list[bytes]:
    shipped = [file.read_bytes() for file in (Path(__file__).parents[2] / "jobs").glob("*.yaml")]
    return [
        *shipped,
        b'input: {path: /in, template: "{{ a }}"}\noutput: {path: s3://b/out}\nmodel: {checkpoint: "builtin:noise"}\n',
        b"a: &a [1, 2]\nb: *a\nc: !!python/object/apply:os.getcwd []\nd: ${HOME:-x}\ne: 0x10\nf: |\n  text\n",
    ]


def _template_seeds() -> list[bytes]:
    return [
        b"{{ title|upper }}: {% for t in tags %}[{{ t }}]{% endfor %} {{ 10 // n }}{{ meta.lang }}",
        b"{% macro m(a, b=1) %}{{ a ~ b }}{% endmacro %}{% set x = m(c) %}{% if x is defined %}{{ x[1:2] }}{% endif %}",
        b"{# note #}{% raw %}{{ }}{% endraw %}{% filter center(9) %}{{ a }}{% endfilter %}{{ '%5d' % b }}",
        b"{{ ''.__class__.__mro__ }}{{ a.format(b) }}{% autoescape true %}{{ a }}{% endautoescape %}\0cell",
    ]


def _part() -> tuple[bytes, bytes, bytes]:
    """Return (part, commit record, plan) of a small job."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "in/a.parquet")
        source.parent.mkdir()
        pq.write_table(pa.table({"prompt": ["a", None, "c"]}), source)
        job = make_job(source, Path(place, "out"))
        plan = plan_of(job)
        reader = reader_of(job)
        part = part_of(reader.read(plan.units[0]), plan)
        reader.close()
        Path(place, "out/_job").mkdir(parents=True)  # as Ledger.open does
        publish(job, plan)
        (record,) = Path(place, "out/_job/units").glob("*.json")
        return part, record.read_bytes(), to_json(plan_fields(plan, job))


def _segment() -> bytes:
    rows = [Row(f"a.parquet#{i}", i, i, f"prompt {i}") for i in range(3)]
    table = result_table(UNIT, [complete_row(row) for row in rows])
    return to_segment(UNIT, DIGEST, table, prompt_rules=2, writer="0" * 32, attempt=1)


def _inputs() -> list[bytes]:
    columns = {
        "prompt": ["a prompt", None, "", "größe", "a prompt"],
        "n": [1, 2, None, 4, 5],
        "tags": [["x", "y"], [], None, [None], ["x"]],
        "word": pa.array(["same"] * 5).dictionary_encode(),
    }
    made = []
    ways: list[dict[str, Any]] = [
        {},
        {"compression": "none", "use_dictionary": False},
        {"row_group_size": 2, "data_page_version": "2.0"},
    ]
    for options in ways:
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, **options)
        made.append(sink.getvalue())
    return made


TARGETS: dict[str, Target] = {
    "job": Target(run_job, _job_seeds),
    "template": Target(run_template, _template_seeds),
    "prompt": Target(run_prompt, _template_seeds),
    "plan": Target(run_plan, lambda: [_part()[2]]),
    "record": Target(run_record, lambda: [_part()[1]]),
    "driver": Target(run_driver, lambda: [b'{"token": "a", "host": "h", "pid": 1, "started": "2026-01-01"}']),
    "part": Target(run_part, lambda: [_part()[0]]),
    "segment": Target(run_segment, lambda: [_segment()]),
    "input": Target(run_input, _inputs),
}
