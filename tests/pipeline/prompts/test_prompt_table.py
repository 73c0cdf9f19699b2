"""Tests what reaches the model: for a job's settings and a row, the exact text that is sent and the exact token ids.

The expectation of a case is a list of pieces: text, which stands for its bytes, and control tokens (BOS, EOS, MASK).
The tokenizer is that of builtin:noise: byte b has id 4 + b, so the ids of the expectation need no tokenizer.
"""

import datetime as dt
import decimal
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.checkpoint.reader import open_checkpoint
from model.checkpoint.tokenizer import Tokenizer
from pipeline.core.types import Row
from pipeline.prompts.encoder import PromptEncoder
from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.rendering.frames import REASON, unpack_prompt
from pipeline.prompts.rendering.process import RowRenderer
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.template import resolve_columns
from pipeline.prompts.values import Outcome
from tests.pipeline.cases import not_utf8


@dataclass(frozen=True)
class Control:
    """A control token of the tokenizer of builtin:noise."""

    id: int
    text: str


BOS, EOS, MASK = Control(1, "<bos>"), Control(2, "<eos>"), Control(3, "<mask>")
Pieces = tuple[str | Control, ...]


@dataclass(frozen=True)
class Case:
    """A row, the settings under which its prompt is made, and the prompt that must come of it, or the error."""

    columns: dict[str, Any]
    """The cells of the row: a Python value, or an Arrow array of one value."""
    template: str | None
    """The template; None: the only column is the prompt column."""
    sent: Pieces = ()
    error: str = ""
    """The text of the error row; the prompt is expected if it is empty."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings of PromptSetup that are not the defaults."""


EMPTY, ALL, NONE = {"nulls": "empty"}, {"special_tokens": "all"}, {"special_tokens": "none"}
METHOD = "builtin_function_or_method"
PRINTS_NONE = "template: an expression prints none: give it a value, as {{ x | default('', true) }} does"
NO_STRUCT = pa.array([None], pa.struct([("text", pa.string()), ("title", pa.string())]))
STRUCT = {"title": "A", "none": None, "tags": ["x", None]}
ADVICE = "give it a default in the template, or set input.nulls: empty"


def null_of(column: str, inside: str = "") -> str:
    return f"template: column '{column}' {f'has a null at {inside}' if inside else 'is null'}: {ADVICE}"


def case(template: str | None, *sent: str | Control, error: str = "", settings: Any = None, **columns: Any) -> Case:
    """Return a case; `cells` holds columns whose names are no words."""
    return Case({**columns.pop("cells", {}), **columns}, template, sent, error, settings or {})


def no_text(kind: str) -> str:
    return f"template: an expression prints a {kind}: it has no text; a filter may need `| list`"


def timestamp(text: str, zone: str | None = None) -> Any:
    return pa.array([dt.datetime.fromisoformat(text)], pa.timestamp("us", zone))


CASES: dict[str, Case] = {
    # A prompt column is sent as it is.
    "column": case(None, "plain text", p="plain text"),
    "column with line ends": case(None, "a\n\n b\t\r\n", p="a\n\n b\t\r\n"),
    "column of bytes": case(None, "Grüße", p="Grüße".encode()),
    "column of large bytes": case(None, "ab", p=pa.array([b"ab"], pa.large_binary())),
    "column of bytes, not UTF-8": case(None, error="column 'p' holds bytes that are not UTF-8 (byte 1)", p=b"a\xff"),
    "column of text, not UTF-8": case(
        None, error="column 'p' holds bytes that are not UTF-8 (byte 0)", p=not_utf8(b"\xff")
    ),
    "column null": case(None, error="prompt is null", p=pa.array([None], pa.string())),
    "column empty": case(None, error="prompt is empty", p=""),
    "column spells EOS": case(None, "a <eos> b", p="a <eos> b"),
    "column spells MASK": case(None, "<mask><mask>", p="<mask><mask>"),
    "column spells EOS, all": case(None, "a ", EOS, " b", settings=ALL, p="a <eos> b"),
    "column spells EOS, none": case(None, "a <eos> b", settings=NONE, p="a <eos> b"),
    "column with private characters": case(None, "\U00100000\U0010fffd\ue000", p="\U00100000\U0010fffd\ue000"),
    # Null is not the word None.
    "null printed": case("Title: {{ x }}", error=null_of("x"), x=None),
    "null printed, empty": case("Title: {{ x }}.", "Title: .", settings=EMPTY, x=None),
    "null of a string column": case("{{ x }}", error=null_of("x"), x=pa.array([None], pa.string())),
    "null with default": case("{{ x | default('n/a') }}", "n/a", x=None),
    "null with d": case("{{ x | d('n/a') }}", "n/a", x=None),
    "null in if": case("{% if x %}yes{% else %}no{% endif %}", "no", x=None),
    "null in if else": case("{{ x if x else 'no' }}", "no", x=None),
    "null is none": case("{{ 1 if x is none else 2 }}", "1", x=None),
    "null is not none": case("{{ 1 if x is not none else 2 }}", "2", x=None),
    "null is defined": case("{{ x is defined }}", "True", x=None),
    "null == none": case("{{ x == none }}{{ none == x }}{{ x != none }}", "TrueTrueFalse", x=None),
    "null == text": case("{{ x == 'a' }}", "False", x=None),
    "null or": case("[{{ x or '' }}]", "[]", x=None),
    "null in for": case("[{% for i in x %}{{ i }}{% endfor %}]", "[]", x=pa.array([None], pa.list_(pa.string()))),
    "null in for else": case("{% for i in x %}{{ i }}{% else %}none{% endfor %}", "none", x=None),
    "null upper": case("{{ x | upper }}", error=null_of("x"), x=None),
    "null upper, empty": case("a{{ x | upper }}", "a", settings=EMPTY, x=None),
    "null after ~": case("{{ 'a' ~ x }}", error=null_of("x"), x=None),
    "null after ~, empty": case("{{ 'a' ~ x }}", "a", settings=EMPTY, x=None),
    "null after +": case("{{ 'a' + x }}", error=null_of("x"), x=None),
    "null after +, empty": case("{{ 'a' + x }}{{ x + 'b' }}", "ab", settings=EMPTY, x=None),
    "null trim": case("{{ x | trim }}", error=null_of("x"), x=None),
    "null format": case("{{ '%s' | format(x) }}", error=null_of("x"), x=None),
    "null %": case("{{ '%s' % x }}", error=null_of("x"), x=None),
    "null .format": case("{{ '{}'.format(x) }}", error=null_of("x"), x=None),
    "null .format, empty": case("{{ '<{}>'.format(x) }}", "<>", settings=EMPTY, x=None),
    "null join": case("{{ x | join(',') }}", error=null_of("x", "[1]"), x=["a", None]),
    "null join, empty": case("{{ x | join(',') }}", "a,", settings=EMPTY, x=["a", None]),
    "null itself join": case("{{ x | join(',') }}", error=null_of("x"), x=None),
    "null join selected": case("{{ x | select | join(',') }}", "a,b", x=["a", None, "b"]),
    "null length": case("{{ x | length }}", error=null_of("x"), x=None),
    "null int": case("{{ x | int(0) }}", error=null_of("x"), x=None),
    "null method": case("{{ x.upper() }}", error=null_of("x"), x=None),
    "null method, empty": case("a{{ x.upper() }}{{ x.strip() }}", "a", settings=EMPTY, x=None),
    "null slice": case("{{ x[:5] }}", error=null_of("x"), x=None),
    "null compared": case("{{ x < 3 }}", error=null_of("x"), x=None),
    "null replaced in": case("{{ 'ab' | replace('a', x) }}", error=null_of("x"), x=None),
    "null in a built list": case("{{ [x] }}", "[null]", x=None),
    "null set": case("{% set y = x %}{{ y }}", error=null_of("x"), x=None),
    "null in a macro": case("{% macro m(a) %}{{ a }}{% endmacro %}{{ m(x) }}", error=null_of("x"), x=None),
    "null in a filter block": case("{% filter upper %}{{ x }}{% endfilter %}", error=null_of("x"), x=None),
    "null in a struct": case("{{ s.none }}", error=null_of("s", ".none"), s=STRUCT),
    "null in a struct by key": case("{{ s['none'] }}", error=null_of("s", ".none"), s=STRUCT),
    "null in a struct, default": case("{{ s.none | default('-') }}", "-", s=STRUCT),
    "null in a list": case("{{ s.tags[1] }}", error=null_of("s", ".tags[1]"), s=STRUCT),
    "null in a map": case(
        "{{ m.k }}", error=null_of("m", "['k']"), m=pa.array([[("k", None)]], pa.map_(pa.string(), pa.string()))
    ),
    "null struct's field": case("{{ s.a }}", error=null_of("s"), s=pa.array([None], pa.struct([("a", pa.string())]))),
    "null struct's field, default": case(
        "{{ s.a | default('-') }}", "-", s=pa.array([None], pa.struct([("a", pa.string())]))
    ),
    "null struct's field named text": case("{{ s.text | default('-') }}", "-", s=NO_STRUCT),
    "null struct's field named text, if": case("{% if s.text %}yes{% else %}no{% endif %}", "no", s=NO_STRUCT),
    "null struct's field named title, empty": case("[{{ s.title }}]", "[]", settings=EMPTY, s=NO_STRUCT),
    "null struct's items": case("[{% for k, v in s.items() %}{{ k }}{% endfor %}]", "[]", s=NO_STRUCT),
    "null struct's items, filter": case("[{% for k, v in s | items %}{{ k }}{% endfor %}]", "[]", s=NO_STRUCT),
    "null in a text's join": case("{{ ','.join(x) }}", error=null_of("x", "[1]"), x=["a", None]),
    "null in a text's join, empty": case("{{ ','.join(x) }}", "a,", settings=EMPTY, x=["a", None]),
    "null in a text": case("{{ n in x }}", error=null_of("n"), x="a", n=None),
    "null in a text, empty": case("{{ n in x }}{{ n not in x }}", "TrueFalse", settings=EMPTY, x="a", n=None),
    "null as an argument": case("{{ x.replace('a', n) }}", error=null_of("n"), x="a", n=None),
    "null as an argument, empty": case(
        "[{{ x.replace('a', n) }}{{ x | trim(n) }}]", "[a]", settings=EMPTY, x="a", n=None
    ),
    "two nulls, empty": case("[{{ n + m }}{{ n < m }}{{ n == '' }}]", "[FalseTrue]", settings=EMPTY, n=None, m=None),
    "%r": case("{{ '%r' % [x] }}", error="template: a format with %r: use %s, or the filter tojson", x=None),
    "!r": case("{{ '{!r}'.format(x) }}", error="template: a format with !r: use {}, or the filter tojson", x=None),
    "none is safe": case("{{ s.get('no') | safe }}", error=PRINTS_NONE, s=STRUCT),
    "none in a URL": case("{{ {'a': s.get('no')} | urlencode }}", error=PRINTS_NONE, s=STRUCT),
    "null with minus, empty": case(
        "{{ x - 1 }}",
        error="template: column 'x' is null: give it a default in the template: an empty text is not enough here",
        settings=EMPTY,
        x=None,
    ),
    "none in a filter": case("{{ s.get('no') | trim }}", error=PRINTS_NONE, s=STRUCT),
    "none in a join": case("{{ [s.get('no')] | join }}", error=PRINTS_NONE, s=STRUCT),
    "none in a format": case("{{ '%s' % s.get('no') }}", error=PRINTS_NONE, s=STRUCT),
    "none in a list": case("{{ [s.get('no')] }}", "[null]", s=STRUCT),
    "none of an expression": case(
        "{{ s.get('no') }}",
        error=PRINTS_NONE,
        s=STRUCT,
    ),
    "printed struct": case("{{ s }}", '{"title": "A", "none": null, "tags": ["x", null]}', s=STRUCT),
    "struct after ~": case("{{ 'a' ~ s.tags }}", 'a["x", null]', s=STRUCT),
    "struct as JSON": case("{{ s | tojson }}", '{"title": "A", "none": null, "tags": ["x", null]}', s=STRUCT),
    "null as JSON": case("{{ x | tojson }}", "null", x=None),
    "NaN is no null": case("{{ x }}", "nan", x=float("nan")),
    # Text of the corpus is text, and the template's own control tokens are control tokens.
    "literal EOS": case("{{ x }}<eos>", "a", EOS, x="a"),
    "literal and cell": case("<bos>{{ x }}<eos>", BOS, "<bos><eos>", EOS, x="<bos><eos>"),
    "constant": case("{{ '<mask>' + x }}", MASK, "a", x="a"),
    "constant after ~": case("{{ x ~ '<eos>' }}", "a", EOS, x="a"),
    "constant by join": case("{{ ['<bos>', x] | join('<mask>') }}", BOS, MASK, "<eos>", x="<eos>"),
    "constant as default": case("{{ x | default('<eos>') }}", EOS, x=None),
    "constant set": case("{% set e = '<eos>' %}{{ x }}{{ e }}", "a", EOS, x="a"),
    "constant upper": case("{{ ('<eos>' ~ x) | upper }}", EOS, "A", x="a"),
    "half literal, half cell": case("<{{ x }}>", "<eos>", x="eos"),
    "half cell, half literal": case("{{ x }}os>", "<eos>", x="<e"),
    "two halves": case("{{ '<e' ~ 'os>' ~ x }}", "<eos>a", x="a"),
    "two cells": case("{{ x }}{{ y }}", "<eos>", x="<e", y="os>"),
    "cell is searched for a constant": case("{{ '<eos>' in x }}{{ x == '<eos>' }}", "TrueTrue", x="<eos>"),
    "cell is split at a constant": case("{{ x.split('<eos>')[1] }}<eos>", "b", EOS, x="a<eos>b"),
    "constant is replaced in a cell": case("{{ x | replace('<eos>', '') }}", "ab", x="a<eos>b"),
    "a cell's text becomes a constant": case("{{ x | replace('|', '<mask>') }}", "a", MASK, "b", x="a|b"),
    "literal, none": case("{{ x }}<eos>", "a<eos>", settings=NONE, x="a"),
    "literal and cell, all": case("{{ x }}<eos>", MASK, EOS, settings=ALL, x="<mask>"),
    "private characters in a cell": case(
        "<eos>{{ x }}<bos>", EOS, "\U00100000\U000f0000\U00100001", BOS, x="\U00100000\U000f0000\U00100001"
    ),
    "private characters in a struct": case("<eos>{{ s.a }}", EOS, "\U00100000", s={"a": "\U00100000"}),
    "private characters decoded from bytes": case(
        "<eos>{{ (x ~ '').encode('latin-1').decode('utf-8') }}",
        EOS,
        "\U00100000",
        x="\U00100000".encode().decode("latin-1"),
    ),
    "private characters by number": case(
        "<eos>{{ '%c' % n }}", error="template: a format with %c: use a text, not the number of a character", n=0x100000
    ),
    "private characters by a format": case(
        "<eos>{{ '{:c}'.format(n) }}",
        error="template: a format with :c: use a text, not the number of a character",
        n=0x100000,
    ),
    "private characters by translate": case(
        "<eos>{{ x.translate({97: n}) }}",
        error="template: translate makes a character of a number: use a text",
        x="a",
        n=0x100000,
    ),
    "private characters by HTML codes": case(
        "<eos>{{ x | striptags }}{{ (x | safe).unescape() }}", EOS, "\U00100000" * 2, x="&#x100000;"
    ),
    "control tokens are measured and quoted as text": case(
        "<eos>{{ '<eos>' | length }}{{ '<eos>' | urlencode }}{{ x }}", EOS, "5%3Ceos%3Ea", x="a"
    ),
    "private characters by a format's name": case(
        "<eos>{{ '%(a(b))c' % {'a(b)': n} }}",
        error="template: a format with a parenthesis in the name of a value: use another name",
        n=0x100000,
    ),
    "private characters in a field's name": case("<eos>{{ s }}", EOS, '{"\U00100000": 1}', s={"\U00100000": 1}),
    "private characters in a column's name": case(
        "<eos>{{ row }}{{ row['\U00100000'] }}", EOS, '{"\U00100000": 1}1', cells={"\U00100000": 1}
    ),
    "private characters in JSON": case(
        "<eos>{{ x }}", EOS, '"\U00100000"', x=pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"\U00100000"']))
    ),
    "private characters in a large extension type": case(
        "<eos>{{ x }}",
        *(EOS, '"\U00100000"'),
        x=pa.ExtensionArray.from_storage(pa.json_(pa.large_string()), pa.array(['"\U00100000"'], pa.large_string())),
    ),
    "private characters by translate with a list": case(
        "<eos>{{ x.translate(l) }}",
        error="template: translate makes a character of a number: use a text",
        x="\x00",
        l=[0x100000],
    ),
    "a slice behind a control token": case(
        "{% set t = '<eos>' ~ x %}{{ t[('<eos>' | length):] }}{{ t[5] }}", "helloh", x="hello"
    ),
    "a slice with a control token": case(
        "{% set t = '<bos>' ~ x ~ '<eos>' %}{{ t[:t.find('<eos>')] }}", BOS, "hello", x="hello"
    ),
    "a slice through a control token": case("{% set t = '<bos>' ~ x %}{{ t[2:] }}", "os>hello", x="hello"),
    "keys are printed": case("{% for k, v in {'<eos>': x}.items() %}{{ v }}{{ k }}{% endfor %}", "a", EOS, x="a"),
    "structs are compared": case("{{ {'a': '<eos>'} == {'a': x} }}<eos>", "True", EOS, x="<eos>"),
    "JSON with a control token": case(
        "{{ ['<eos>', x] | tojson(indent=0) }}", '[\n"', EOS, '",\n"<eos>"\n]', x="<eos>"
    ),
    "a constant as a key": case("<eos>{{ {'<eos>': x}['<eos>'] }}{{ {'<eos>': x}.get('<eos>') }}", EOS, "aa", x="a"),
    "a constant by keyword": case(
        "<eos>{{ x.split(sep='<eos>') | join }}{{ x | replace(old='<eos>', new='') }}", EOS, "abab", x="a<eos>b"
    ),
    "a constant in both": case("{{ (x ~ 'b<eos>') | replace('<eos>', '') }}", "ab", x="a<eos>"),
    "a constant in groups": case("<eos>{% for g in x | groupby(0) %}{{ g == g }}{% endfor %}", EOS, "True", x=[["a"]]),
    # Templates say what they send.
    "last line end": case("{{ x }}\n", "a\n", x="a"),
    "two last line ends": case("{{ x }}\n\n", "a\n\n", x="a"),
    "JSON is not HTML": case(
        "{{ x | tojson }}", json.dumps("it's <b>&</b> ü", ensure_ascii=False), x="it's <b>&</b> ü"
    ),
    "JSON in input order": case("{{ s | tojson }}", '{"b": 1, "a": 2}', s={"b": 1, "a": 2}),
    "JSON indented": case("{{ s | tojson(indent=2) }}", '{\n  "b": 1\n}', s={"b": 1}),
    "row by name": case('{{ row["doc id"] }}', "a", cells={"doc id": "a"}),
    "row with a dot": case("{{ row['text.body'] }}", "a", cells={"text.body": "a"}),
    "row with an emoji": case("{{ row['🙂'] }}", "a", cells={"🙂": "a"}),
    "row by a plain name": case("{{ row.title }}", "a", title="a"),
    "row by expression": case("{{ row['t' ~ n] }}", "a", t1="a", n=1),
    "row as JSON": case("{{ row | tojson }}", '{"b c": "x", "a": null}', cells={"b c": "x", "a": None}),
    "a null in row": case("{{ row['a b'] }}", error=null_of("a b"), cells={"a b": None}),
    "row is a column": case("{{ row }}{{ row['x'] }}", '{"x": "a"}a', row={"x": "a"}),
    "range": case("{% for i in range(3) %}{{ i }}{{ x }}{% endfor %}", "0a1a2a", x="a"),
    "range too long": case(
        "{{ x }}{% for i in range(10 ** 9) %}{% endfor %}",
        error="template: range has more than 100000 numbers",
        x="a",
    ),
    "range is a column": case("{{ range }}", "5", range=5),
    "namespace": case(
        "{% set n = namespace(a=0) %}{% for i in x %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}", "6", x=[1, 2, 3]
    ),
    "loop": case("{% for i in x %}{{ loop.index }}{{ i }}{% endfor %}", "1a2b", x=["a", "b"]),
    "break": case("{% for i in x %}{% if i == 'b' %}{% break %}{% endif %}{{ i }}{% endfor %}", "a", x=["a", "b"]),
    "date": case("{{ x }}", "2024-01-31", x=dt.date(2024, 1, 31)),
    "timestamp": case("{{ x }}", "2024-01-31 12:00:00", x=timestamp("2024-01-31T12:00:00")),
    "timestamp with zone": case(
        "{{ x }}", "2024-01-31 13:00:00+01:00", x=timestamp("2024-01-31T12:00:00+00:00", "Europe/Berlin")
    ),
    "date after ~": case("{{ 'on ' ~ x }}", "on 2024-01-31", x=dt.date(2024, 1, 31)),
    "date in JSON": case("{{ s }}", '{"d": "2024-01-31"}', s={"d": dt.date(2024, 1, 31)}),
    "decimal": case("{{ x }}", "1.50", x=decimal.Decimal("1.50")),
    "bool": case("{{ x }}", "True", x=True),
    "float": case("{{ x }}", "0.1", x=0.1),
    "float of 32 bits": case("{{ x }}", "0.1", x=pa.array([0.1], pa.float32())),
    "bytes": case("{{ x }}", "Grüße", x="Grüße".encode()),
    "bytes not UTF-8": case("{{ x }}", error="column 'x' holds bytes that are not UTF-8 (byte 0)", x=b"\xff"),
    "bytes in a list": case("{{ x[0] }}", "a", x=[b"a"]),
    "bytes in a list, not UTF-8": case(
        "{{ x }}", error="column 'x' holds bytes that are not UTF-8 (byte 0)", x=[b"\xff"]
    ),
    "list": case("{{ x }}", '["a", "ü"]', x=["a", "ü"]),
    "map": case("{{ x }}{{ x.a }}", '{"a": 1}1', x=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))),
    "a function is not printed": case(
        "{{ x.upper }}",
        error="template: an expression prints a builtin_function_or_method: it has no text; a filter may need `| list`",
        x="a",
    ),
    "a generator is not printed": case(
        "{{ x | map('upper') }}",
        error="template: an expression prints a generator: it has no text; a filter may need `| list`",
        x=["a"],
    ),
    "a method in a list is not printed": case("{{ [x.index] }}", error=no_text(METHOD), x="a"),
    "a generator in a filter is not printed": case(
        "{{ x | map('upper') | trim }}", error=no_text("generator"), x=["a"]
    ),
    "a method in a format is not printed": case("{{ '%s' % x.index }}", error=no_text(METHOD), x="a"),
    "a namespace is not printed": case("{{ namespace(a=x) }}", error=no_text("Namespace"), x="a"),
    "a loop is not printed": case("{% for i in x %}{{ loop }}{% endfor %}", error=no_text("LoopContext"), x=["a"]),
    "keys are a list": case("{{ s.keys() }}{{ s.keys() | tojson }}", '["a"]["a"]', s={"a": 1}),
    "the clock": case(
        "{{ x.now() }}",
        error="template: access to attribute 'now' of 'datetime' object is unsafe.",
        x=timestamp("2024-01-31T12:00:00"),
    ),
    "floats of 32 bits in a list": case("{{ x }}", "[0.1]", x=pa.array([[0.1]], pa.list_(pa.float32()))),
    "float of 16 bits": case("{{ x }}", "0.1", x=pa.array([np.float16(0.1)], pa.float16())),
    "set in an if": case("{% if x %}{% set y = 'a' %}{{ y }}{% endif %}", "a", x="b"),
    "set in an if, a column": case("{% if x == 'c' %}{% set y = 'a' %}{% endif %}{{ y }}", "d", x="b", y="d"),
    "an error names the null columns": case(
        "{{ [1, 2][n] ~ x }}",
        error=null_of("n"),
        x="a",
        n=None,
    ),
}


def one(value: Any) -> Any:
    return value if isinstance(value, pa.Array) else pa.array([value])


def make(case: Case) -> tuple[PromptSetup, Outcome]:
    """Return the setup of the case, and what becomes of its row."""
    table = pa.table({name: one(value) for name, value in case.columns.items()})
    columns = tuple(case.columns) if case.template is None else resolve_columns(case.template, table.column_names)
    setup = PromptSetup(columns, case.template, control_tokens=TOKENIZER.control_tokens, **case.settings)
    if case.template is None:
        (outcome,) = PromptMaker(setup).make(table)
        return setup, outcome
    ((kind, content),) = RowRenderer(setup).render(table)
    return setup, (unpack_prompt(kind, content), None) if kind != REASON else (None, content.decode())


def tokenizer() -> Tokenizer:
    content = open_checkpoint("builtin:noise").tokenizer_json()
    assert content is not None
    return Tokenizer(content)


TOKENIZER = tokenizer()


@pytest.mark.parametrize("name", CASES)
def test_the_text_and_the_tokens_that_are_sent(name: str) -> None:
    case = CASES[name]
    setup, (prompt, reason) = make(case)
    assert reason == (case.error or None)
    if prompt is None:
        assert case.error
        return
    assert prompt.text == "".join(piece if isinstance(piece, str) else piece.text for piece in case.sent)
    row = Row("f#0", 0, 0, prompt.text, control=prompt.control)
    (ids,) = PromptEncoder(TOKENIZER, setup).encode([row])
    expected: list[int] = []
    for piece in case.sent:
        expected += [4 + byte for byte in piece.encode()] if isinstance(piece, str) else [piece.id]
    assert list(ids) == expected


def test_there_are_many_cases() -> None:
    """The table is the definition of what is sent, so it must not shrink unnoticed."""
    assert len(CASES) >= 100
