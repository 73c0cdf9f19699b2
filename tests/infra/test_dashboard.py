"""Tests the Grafana dashboard: it uses metrics and labels that a run sets, and the README's command installs it."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.infra.files import INFRA, ROOT
from tests.infra.test_readme import COMMANDS
from tests.waiting import PATIENCE_S
from workers.cluster.metrics import COUNTERS, GAUGES, JOB

DASHBOARD = json.loads((INFRA / "grafana/twotower.json").read_text())
TARGETS = [
    pytest.param(target, id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
OF_RAY = {"SessionName"}
"""Labels that Ray adds to every metric (tests/workers/cluster/test_metrics_endpoint.py reads them)."""


def labels_of(name: str) -> set[str]:
    _, tags = (COUNTERS | GAUGES)[name]
    return {JOB, *tags} | OF_RAY


@pytest.mark.parametrize("target", TARGETS)
def test_expressions_use_metrics_and_labels_that_there_are(target: dict[str, Any]) -> None:
    """Counters appear only within rate or increase, and gauges never do."""
    expression = target["expr"]
    names = re.findall(r"ray_(twotower_\w+)", expression)
    assert names
    labels = set.intersection(*map(labels_of, names))
    assert set(re.findall(r"(\w+)=~", expression)) <= labels
    kept = [set(found.split(", ")) for found in re.findall(r"by \(([\w, ]+)\)", expression)]
    assert all(each <= labels for each in kept)
    shown = set.union(*kept) if kept else labels
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= shown
    of_rates = re.findall(r"(?:rate|increase)\(ray_(twotower_\w+)", expression)
    assert set(of_rates) == {name for name in names if name in COUNTERS}
    assert expression.count("(") == expression.count(")")


def test_every_metric_is_on_the_dashboard() -> None:
    text = json.dumps(DASHBOARD)
    missing = {name for name in COUNTERS | GAUGES if not re.search(rf"ray_{name}\b", text)}
    assert missing == set()


def test_panels_have_places_and_names_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_variables_ask_for_labels_that_there_are() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(?:{)?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == variables.keys()
    for variable in variables.values():
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\(ray_(\w+), (\w+)\)", variable["query"]["query"])
            assert found is not None
            assert found[2] in labels_of(found[1])


def test_the_command_installs_it(tmp_path: Path) -> None:
    [command] = [command for command in COMMANDS if command.startswith("cp ")]
    words = shlex.split(command)
    subprocess.run([*words[:-1], str(tmp_path)], cwd=ROOT, check=True, timeout=PATIENCE_S)
    assert json.loads((tmp_path / "twotower.json").read_text()) == DASHBOARD
