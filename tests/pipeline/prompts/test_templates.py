"""Tests of templates from strangers: whatever one does costs only its own row, and checking one computes nothing."""

import datetime as dt
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jinja2.filters import FILTERS

from pipeline.core.errors import InputError
from pipeline.prompts import renderer
from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.template import template_names
from pipeline.prompts.values import Outcome, Prompt
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and /proc are Linux's")


def maker_of(template: str, *columns: str) -> PromptMaker:
    return PromptMaker(PromptSetup(columns, template))


def texts(outcomes: Iterable[Outcome]) -> list[tuple[str | None, str | None]]:
    return [(None if prompt is None else prompt.text, reason) for prompt, reason in outcomes]


def rendered(template: str, **columns: Any) -> list[tuple[str | None, str | None]]:
    maker = maker_of(template, *columns)
    try:
        return texts(maker.make(pa.table(columns)))
    finally:
        maker.close()


@LINUX
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for _ in n*[1] %}{% for _ in n*[1] %}{% for _ in n*[1] %}{% endfor %}{% endfor %}{% endfor %}",
            "computing",
        ),
        ("{{ (9 ** (n * 1000000)) % 7 }}", "computing"),  # one call into C, which Python's signal handlers cannot end
        ("{{ 'x'.ljust(n * 100000000) }}", "memory"),
        ("{{ n.to_bytes(n * 100000000) | length }}", "memory"),
        ("{{ ('xy' * n * 1000) | replace('x', 'xy' * n * 1000) | length }}", "memory"),
    ],
)
def test_a_row_without_end_or_measure_is_an_error_row(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is slow or large, a loop or a single call, costs only its own row, and the rows around it are made."""
    monkeypatch.setattr(renderer, "ROW_SECONDS", 0.3)
    monkeypatch.setattr(renderer, "MEMORY_BYTES", 1 << 28)
    made = rendered("{% if n == 1 %}{{ n }}{% else %}" + template + "{% endif %}", n=[1, 1000, 1, 1000, 1])
    assert [prompt for prompt, _ in made] == ["1", None, "1", None, "1"]
    limit = {"computing": "0.3 s", "memory": "256 MiB"}[said]
    assert made[1][1] == made[3][1] == f"template: takes more than {limit} of {said}"


def test_a_prompt_far_too_long_does_not_reach_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused in the process that makes it, so its 100 MB never cross the pipe."""
    read: list[int] = []
    original = os.read

    def counted(fd: int, size: int) -> bytes:
        data = original(fd, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "read", counted)
    ((prompt, reason),) = rendered("{{ 'x'.ljust(n) }}", n=[100_000_000])
    assert prompt is None
    assert str(reason).startswith("prompt has 100000000 characters")
    assert sum(read) < 10_000


def test_endless_recursion_is_an_error_row() -> None:
    made = rendered("{% macro f(a) %}{{ f(a + 1) }}{% endmacro %}{% if n %}{{ f(n) }}{% endif %}ok", n=[0, 1])
    assert made[0] == ("ok", None)
    assert str(made[1][1]).startswith("template: maximum recursion depth exceeded")


def test_too_many_such_rows_end_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "ROW_SECONDS", 0.1)
    monkeypatch.setattr(renderer, "ENDED_ROWS_AT_MOST", 1)
    with pytest.raises(InputError, match=r"^template: 2 rows of one unit could not be rendered, the last: takes more"):
        rendered("{{ (9 ** (n * 1000000)) % 7 }}", n=[1000] * 3)


@pytest.mark.parametrize(
    "template",
    [
        "{{ a }}{{ 'x' | center(10 ** 12) }}",
        "{{ a }}{{ 'x'.ljust(10 ** 12) }}",
        "{{ a }}{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ a }}{% set x = 9 ** 9 ** 9 ** 9 %}",
        "{{ a }}{% if 9 ** 9 ** 9 ** 9 %}{% endif %}",
        "{{ a }}{{ {'k': 'x' | center(10 ** 12)}['k'] }}",
        "{{ a }}{% macro m(b='x'.ljust(10 ** 12)) %}{% endmacro %}",
        "{{ a }}{% filter center(10 ** 12) %}x{% endfilter %}",
        "{{ a }}{{ 'x' | replace('x', 'y'.ljust(10 ** 12)) ~ 'z' }}",
    ],
)
def test_checking_a_template_computes_nothing_of_it(template: str) -> None:
    """The driver and every process that loads the job file compile the template, but its constants stay uncomputed."""
    assert template_names(template).free == {"a"}


@pytest.mark.parametrize(
    "template",
    ["{{ X }}", "{{ X ~ 'b' }}", "{% if X %}{% endif %}", "{% set b = X %}", "{{ [X] }}", "{{ m(X) }}", "{{ X.y }}"],
)
def test_checking_a_template_calls_nothing(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setitem(FILTERS, "center", called.append)
    assert "a" in template_names("{{ a }}" + template.replace("X", "('x' | center(9))")).free
    assert not called


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% autoescape 9 ** 9 ** 9 ** 9 %}{{ a }}{% endautoescape %}",
            "template, line 1: autoescape is not for prompts",
        ),
        ("{{ " + "(" * 9000 + "a" + ")" * 9000 + " }}", "template is nested too deeply"),
        ("{% for b in a %}" * 50 + "{% endfor %}" * 50, "template is nested too deeply"),
        ("{{ a }}" * 3000, "template has 3000 expressions, above the limit of 2000"),
        ("{{ a }}" + "x" * 1_000_000, "template has 1000007 characters, above the limit of 1000000"),
        ("{{ [a, 1] | random }}", "template, line 1: No filter named 'random'."),
        ("{{ a | pprint }}", "template, line 1: No filter named 'pprint'."),
        ("{% include '/x' %}{{ a }}", "template, line 1: include is not available: there are no other templates"),
        ("{% import 'x' as y %}{{ a }}", "template, line 1: import is not available: there are no other templates"),
        (
            "{% from 'x' import y %}{{ a }}",
            "template, line 1: fromimport is not available: there are no other templates",
        ),
        ("{% extends a %}", "template, line 1: extends is not available: there are no other templates"),
        (
            "{{ self._TemplateReference__context }}{{ a }}",
            "template, line 1: `self` is not available; a column of this name is written row['self']",
        ),
    ],
)
def test_templates_that_are_refused(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^template") as caught:
        template_names(template)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ a }}",
        "{{ a['__class__'] }}",
        "{{ a | attr('__class__') }}",
        "{{ '{0.__class__}'.format(a) }}",
        "{{ '%s' | format(a.__class__) }}",
        "{{ (a ~ '').format_map({'x': a.__init__}) }}{{ a.__init__.__globals__ }}",
        "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ a }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}{{ a }}",
        "{{ lipsum.__globals__ }}{{ a }}",
        "{{ [].append(a) }}",
    ],
)
def test_no_way_out_of_the_sandbox(template: str) -> None:
    columns = template_names(template).free
    (made,) = rendered(template, **{name: ["x"] for name in columns})
    assert made[0] is None, made
    assert str(made[1]).startswith("template: ")


def test_times_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zone of the machine does not count, nor does pandas, with which pyarrow makes other values of times."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    noon = dt.datetime(2024, 1, 31, 12)
    assert rendered("{{ x.timestamp() }} {{ x.astimezone() }}", x=[noon]) == [
        ("1706702400.0 2024-01-31 12:00:00+00:00", None)
    ]
    exact = pa.array([1_000, 1], pa.timestamp("ns"))
    assert rendered("{{ x }}", x=exact) == [
        ("1970-01-01 00:00:00.000001", None),
        (None, "column 'x' holds a time with nanoseconds: make them microseconds"),
    ]


def test_a_prompt_column_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    maker = PromptMaker(PromptSetup(("a",)))
    assert texts(maker.make(pa.table({"a": ["x", None]}))) == [("x", None), (None, "prompt is null")]
    maker_of("{{ a }}", "a")  # a template needs none either before its first row
    maker.close()


def child_of(maker: PromptMaker) -> Any:
    return maker._renderer._child._process  # type: ignore[union-attr]


def test_a_process_killed_from_outside_changes_no_row() -> None:
    maker = maker_of("{{ n }}", "n")
    table = pa.table({"n": list(range(1000))})
    made: list[Outcome] = []
    for number, row in enumerate(maker.make(table)):
        if number in (0, 500):
            child_of(maker).send_signal(signal.SIGKILL)
        made.append(row)
    assert texts(made) == [(str(n), None) for n in range(1000)]
    maker.close()


def test_rows_that_were_not_taken_are_not_given_to_the_next_table() -> None:
    maker = maker_of("{{ n }}", "n")
    assert next(iter(maker.make(pa.table({"n": [1, 2, 3]}))))[0] == Prompt("1")
    assert texts(maker.make(pa.table({"n": [4, 5]}))) == [("4", None), ("5", None)]
    maker.close()


ORPHAN = """
import os, signal, pyarrow as pa
from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.setup import PromptSetup
maker = PromptMaker(PromptSetup(("n",), "{% for _ in n*[1] %}{% for _ in n*[1] %}{% endfor %}{% endfor %}{{ n }}"))
list(maker.make(pa.table({"n": [1]})))
print(maker._renderer._child._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@LINUX
def test_the_process_ends_with_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    stat = Path(f"/proc/{int(done.stdout)}/stat")

    def gone() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):  # the second error: the process ended while its file was read
            return True

    wait_until(gone)
