"""`python -m tests.benchmarks.rendering [FOLDER]`: measures how fast templates make prompts.

Prints the rows per second of a process that renders, with its pipes, for several templates. FOLDER is another checkout
of this project, which may be older than the settings of prompts: then the first template is rendered by both in turn,
each time in a new process, and the last line has the ratio of each round (this checkout over the other one) and their
median.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROWS, ROUNDS, TEXT_WORDS = 40_000, 7, 40
ROOT = Path(__file__).parents[2]
MEASURE = """
import random, sys, time
import pyarrow as pa
from pipeline.prompts.prompts import PromptMaker

rows, words, template = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rng = random.Random(0)
vocabulary = ["alpha", "beta", "gamma", "delta", "Gr\u00fc\u00dfe"]
def texts(count): return [" ".join(rng.choices(vocabulary, k=count)) for _ in range(rows)]
table = pa.table({"title": texts(6), "body": texts(words), "tags": [["a", None]] * rows})
try:
    from pipeline.prompts.setup import PromptSetup
    from pipeline.prompts.template import resolve_columns
    columns = resolve_columns(template, table.column_names)
    maker = PromptMaker(PromptSetup(columns, template, control_tokens=("<bos>", "<eos>")))
except ImportError:  # an older checkout
    maker = PromptMaker(None, template)
list(maker.make(table.slice(0, 300)))  # starts the process
best = float("inf")
for _ in range(3):
    begin = time.perf_counter()
    assert sum(1 for _ in maker.make(table)) == rows
    best = min(best, time.perf_counter() - begin)
maker.close()
print(rows / best)
"""
TEMPLATES = {
    "two columns": "Rewrite: {{ title }}\n\n{{ body }}\nAnswer:",
    "with control tokens": "<bos>Rewrite: {{ title }}\n\n{{ body }}<eos>",
    "with a list": "{{ title }}: {{ tags | select | join(', ') }}\n{{ body }}",
    "with a filter and a test": "{{ title | upper }}{% if body is string %}{{ body | trim }}{% endif %}",
}


def rate(template: str, folder: Path = ROOT) -> float:
    """Return the rows per second that a checkout renders, in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", MEASURE, str(ROWS), str(TEXT_WORDS), template]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure all templates, and the ratio to another checkout if its folder is given."""
    for name, template in TEMPLATES.items():
        print(f"{name:<26} {rate(template):>9,.0f} rows/s")
    if len(sys.argv) > 1:
        other, template = Path(sys.argv[1]).resolve(), TEMPLATES["two columns"]
        ratios = []
        for number in range(ROUNDS):
            sides = [ROOT, other] if number % 2 else [other, ROOT]
            found = {side: rate(template, side) for side in sides}
            ratios.append(found[ROOT] / found[other])
        print(f"ratio {statistics.median(ratios):.2f} of", ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
