"""Renders the HTML pages of the report and of `calibrate` from templates, and makes foreign texts safe to show.

A page is one file that runs no script and loads nothing.
"""

import unicodedata
from collections.abc import Mapping
from typing import Any

from pipeline.pages import chart

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2127; --soft: #5b6570; --line: #d5dae0; --box: #f4f6f8;
  --mark: #ffe9a8; --pick: #e3f1e7; --series-0: #1f6fd0; --series-1: #c2540a; --series-2: #1c8a5a;
  --series-3: #8a4fc4; --series-4: #b3307a; --series-5: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --text: #e4e8ec; --soft: #a0abb6; --line: #39424c;
  --box: #1d232a; --mark: #5c4a12; --pick: #1d3a2a; --series-0: #6aa9f7; --series-1: #f0935a; --series-2: #5cc596;
  --series-3: #bb92ee; --series-4: #ee82bb; --series-5: #9ca3af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 16px 64px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 8px; }
p, li { max-width: 72ch; overflow-wrap: anywhere; }
.verdict { max-width: none; font-size: 18px; padding: 14px 16px; border-left: 4px solid var(--series-0);
  background: var(--box); }
.open { border-left-color: var(--series-1); }
.soft { color: var(--soft); font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { background: var(--box); border-radius: 6px; padding: 10px 12px; }
.tile b { display: block; font-size: 17px; line-height: 1.3; }
.tile span { color: var(--soft); font-size: 13px; }
figure { margin: 12px 0; }
figcaption { color: var(--soft); font-size: 14px; max-width: 72ch; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td small { color: var(--soft); font-weight: normal; }
th.text { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 200px; }
.settings td { white-space: normal; overflow-wrap: anywhere; min-width: 0; }
"""
"""The CSS of all pages, for light and dark mode and for screens from a phone's width up."""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ heading }}</h1>
<p class="verdict{{ '' if complete else ' open' }}">{{ verdict }}</p>
<div class="tiles">
{% for label, value in tiles %}<div class="tile"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
{% if notes %}<ul>
{% for note in notes %}<li>{{ note }}</li>
{% endfor %}</ul>
{% endif %}
BODY</body>
</html>
"""
_MACROS = """{% macro key(css, label, mark="m-5,-5h10v10h-10z") -%}
<span class="key"><svg viewBox="-7 -7 14 14"><path class="{{ css }}" d="M0,0{{ mark }}"/></svg>{{ label }}</span>
{% endmacro %}
{% macro figure(chart, caption, keys=()) %}<figure>{{ chart | safe }}<figcaption>
{%- if keys %}<div class="keys">{% for one in keys %}{{ key(*one) }}{% endfor %}</div>{% endif %}
{{- caption }}</figcaption></figure>{% endmacro %}
{% macro table(heads, rows, texts=(), css="") %}<div class="wide"><table class="{{ css }}">
<tr>{% for head in heads %}<th{% if loop.index0 in texts %} class="text"{% endif %}>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td{% if loop.index0 in texts %} class="text"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
"""
"""Jinja2 macros for the bodies of all pages. key: an entry of a legend. figure: a chart with its legend and caption.
table: a table; `texts` are the indexes of the columns with text, which are aligned to the left."""
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction in which the text around them is shown."""


def render(body: str, context: Mapping[str, Any], *, title: str, style: str = "", complete: bool = True) -> bytes:
    """Return a page as UTF-8 HTML.

    `body`: a jinja2 template, which follows the heading, the verdict, the tiles and the notes that every page begins
    with. `context`: the values for all of these; texts among them are escaped, except charts and what the template
    marks as `safe`. `title`: the title of the browser's tab. `style`: CSS in addition to that of all pages. `complete`:
    whether the verdict is final; if not, its colour says so. Raises jinja2.UndefinedError if a value is missing.
    """
    from jinja2 import Environment, StrictUndefined

    source = _PAGE.replace("BODY", _MACROS + body)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    style = _STYLE + chart.STYLE + style
    return template.render(title=title, style=style, complete=complete, **context).encode("utf-8", "replace")


def shown(text: str, at_most: int) -> str:
    """Return a text that anybody may have written so that it is safe and fully visible on a page or a terminal.

    Control characters, direction marks, surrogates, and private or unassigned characters are replaced by visible ones;
    tabs and newlines stay. After `at_most` characters the text is cut, and the result says how many more
    there were.
    """
    cut = text if len(text) <= at_most else text[:at_most]
    visible = "".join(map(_visible, cut))
    return visible if cut is text else f"{visible}… ({len(text) - at_most:,} more characters)"


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if character < " ":
        return chr(0x2400 + ord(character))
    if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn"):
        return f"⟨U+{ord(character):04X}⟩"
    return character
