"""Renders the HTML report of a calibration. The template escapes all texts that are put into it."""

from collections.abc import Mapping
from typing import Any

from pipeline.report import page

_STYLE = """
tr.chosen td { background: var(--pick); font-weight: 600; }
.texts { border-top: 1px solid var(--line); padding-top: 10px; margin-top: 14px; }
pre { margin: 4px 0 8px; padding: 10px; background: var(--box); border-radius: 6px; max-height: 320px; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
mark { background: var(--mark); color: inherit; }
"""

_BODY = """<h1>Calibration of {{ name }}</h1>
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
"""


def render(context: Mapping[str, Any]) -> bytes:
    """Return the page as bytes. All texts of the context are escaped, except `quality_chart` and the charts in
    `small_charts`, which are SVG."""
    return page.render(_BODY, context, title=f"Calibration of {context['name']}", style=_STYLE)
