"""The report as a page: one file, no script, nothing fetched. The template escapes whatever is put into it."""

from collections.abc import Mapping
from typing import Any

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
.soft { color: var(--soft); font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { background: var(--box); border-radius: 6px; padding: 10px 12px; }
.tile b { display: block; font-size: 17px; line-height: 1.3; }
.tile span { color: var(--soft); font-size: 13px; }
figure { margin: 12px 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 620px; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: 14px; max-width: 72ch; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td small { color: var(--soft); font-weight: normal; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.chosen td { background: var(--pick); font-weight: 600; }
.texts { border-top: 1px solid var(--line); padding-top: 10px; margin-top: 14px; }
pre { margin: 4px 0 8px; padding: 10px; background: var(--box); border-radius: 6px; max-height: 320px; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
mark { background: var(--mark); color: inherit; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Calibration of {{ name }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>Calibration of {{ name }}</h1>
<p class="verdict">{{ verdict }}</p>
<div class="tiles">
{% for label, value in tiles %}<div class="tile"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
{% if notes %}<ul>
{% for note in notes %}<li>{{ note }}</li>
{% endfor %}</ul>
{% endif %}
<h2>Quality and speed</h2>
<figure>{{ quality_chart | safe }}<figcaption>{{ quality_caption }}</figcaption></figure>
{% if small_charts %}<div class="pair">
{% for chart, caption in small_charts %}<figure>{{ chart | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>
{% endif %}
<h2>All points</h2>
<div class="wide"><table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for chosen, cells in points %}<tr{% if chosen %} class="chosen"{% endif %}>
{%- for cell, beside in cells %}<td>{{ cell }}{% if beside %} <small>{{ beside }}</small>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>
{% for line in under_points %}<p class="soft">{{ line }}</p>
{% endfor %}
{% if missing %}<details><summary>{{ missing | length }} points were not measured</summary><ul class="soft">
{% for point, why in missing %}<li>{{ point }}: {{ why }}</li>
{% endfor %}</ul></details>
{% endif %}
<h2>Texts side by side</h2>
<p>{{ texts_about }}</p>
{% for text in texts %}<div class="texts">
<p class="soft">{{ text.id }}: {{ text.about }}</p>
<pre dir="auto">{{ text.prompt }}</pre>
<div class="pair"><div><span class="soft">AR</span>
<pre dir="auto">{{ text.start }}<mark>{{ text.ar }}</mark>{{ text.end }}</pre></div>
<div><span class="soft">{{ other }}</span>
<pre dir="auto">{{ text.start }}<mark>{{ text.other }}</mark>{{ text.end }}</pre></div></div>
</div>
{% endfor %}
<h2>The sample</h2>
{% for line in sample %}<p>{{ line }}</p>
{% endfor %}
<div class="wide"><table>
<tr><th>prompt tokens</th><th>share of all rows</th><th>rows of the sample</th></tr>
{% for stratum in strata %}<tr>{% for cell in stratum %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>How it was measured</h2>
{% for line in method %}<p>{{ line }}</p>
{% endfor %}
<h2>Settings</h2>
<div class="wide"><table>
{% for key, value in settings %}<tr><td>{{ key }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}</table></div>
</body>
</html>
"""


def render(context: Mapping[str, Any]) -> bytes:
    """The page. All texts of the context are escaped; `quality_chart` and those of `small_charts` are SVG."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_PAGE).render(style=_STYLE, **context).encode("utf-8", "replace")
