"""The jinja2 template of the body of a calibration's report.html, and its CSS beside that of all pages."""

STYLE = """
tr.chosen td { background: var(--pick); font-weight: 600; }
.texts { border-top: 1px solid var(--line); padding-top: 10px; margin-top: 14px; }
pre { margin: 4px 0 8px; padding: 10px; background: var(--box); border-radius: 6px; max-height: 320px; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
mark { background: var(--mark); color: inherit; }
"""

BODY = """<h2>Quality and speed</h2>
{{ figure(quality[0], "Higher points agree better with AR, points further right are faster. The numbers are confidence "
~ "thresholds, the thin bars 95% intervals, the dotted lines the speeds of AR.", quality[1]) }}
{% if small_charts %}<div class="pair">
{% for chart, keys, caption in small_charts %}{{ figure(chart, caption, keys) }}
{% endfor %}</div>
{% endif %}
<h2>All points</h2>
<div class="wide"><table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for chosen, cells in points %}<tr{% if chosen %} class="chosen"{% endif %}>
{%- for cell, beside in cells %}<td>{{ cell }}{% if beside %} <small>{{ beside }}</small>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>
<p class="soft">{{ under_points }}</p>
{% if missing %}<details><summary>Points that were not measured: {{ missing | length }}</summary><ul class="soft">
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
{{ table(["prompt tokens", "share of all rows", "rows of the sample"], strata) }}
<h2>How it was measured</h2>
{% for line in method %}<p>{{ line }}</p>
{% endfor %}
<h2>Settings</h2>
{{ table(["setting", "value"], settings, (1,), "settings") }}
"""
