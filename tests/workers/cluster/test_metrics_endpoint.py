"""Tests of the metrics of a job at the port of a Ray node, from which Prometheus reads them. test_metrics.py tests how
they are set."""

import io
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from pipeline.driver.run import run_job
from pipeline.monitoring.live import Live
from pipeline.monitoring.progress import LineDisplay
from pipeline.monitoring.status import read_job
from tests.waiting import wait_until
from tests.workers.fakes import FakeMaker
from tests.workers.jobs import open_job, prompts_of
from workers.cluster.metrics import COUNTERS, GAUGES, RayMetrics
from workers.cluster.pool import RayPool
from workers.replica.build import ReplicaSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


NOT_IN_A_GOOD_RUN = {
    "twotower_retries_total",
    "twotower_replicas_lost_total",
    "twotower_preemptions_total",
    "twotower_batch_rows_total",  # the fake engine reports neither batches nor room
    "twotower_batched_rows_total",
    "twotower_prefill_tokens_total",
    "twotower_prefill_padded_tokens_total",
}
"""Counters that stay at 0 in a run without faults. Prometheus does not get a counter that was never increased."""


@pytest.mark.usefixtures("ray_cluster")
def test_metrics_are_scraped_from_the_nodes_port_and_the_folder_says_who_ran(tmp_path: Path) -> None:
    """A whole job runs through run_job. Each metric that it sets is at the endpoint, with its labels and its value."""
    small = open_job(
        tmp_path, [*prompts_of(60), None], workers={"gpus": 0, "cpus": 2, "replicas": 2}, retry={"max_error_rate": 1}
    )
    seen: list[Live] = []
    outcome = run_job(
        small.job,
        lambda plan, units, tell: RayPool(
            FakeMaker(ReplicaSpec(small.job, plan.fingerprint.digest, plan.schema, plan.prompts)),
            small.job.workers,
            units,
            tell,
        ),
        threading.Event(),
        lambda: LineDisplay(io.StringIO()),
        [RayMetrics("small"), seen.append],
    )
    assert outcome.totals.rows == 61
    status = read_job(small.job.output.path)
    assert status.live is not None
    of_file = {name: getattr(status.live, name) for name in ("time", "writes", "boot", "uptime")}  # set by each write
    assert (status.state, status.live) == ("complete", replace(seen[-1], **of_file))
    samples = scrape(lambda found: sum(found.get("ray_twotower_rows_total", {}).values()) >= 61)
    assert sum(samples["ray_twotower_rows_total"].values()) == 61
    assert set(samples["ray_twotower_rows_total"]) <= {"r0", "r1"}
    assert samples["ray_twotower_error_rows_total"] == {"prompt is null": 1}
    assert samples["ray_twotower_job_rows_done"] == {"-": 61}
    always = {*COUNTERS, *GAUGES} - NOT_IN_A_GOOD_RUN
    assert {f"ray_{name}" for name in always} <= samples.keys()


def scrape(enough: Callable[[dict[str, dict[str, float]]], bool]) -> dict[str, dict[str, float]]:
    """Return the metrics of the job "small" from the node's endpoint, once they are enough. The values are by metric
    and by replica or kind; the key is - if there is neither."""
    last: dict[str, dict[str, float]] = {}

    def look() -> bool:
        last.clear()
        here = ray.get_runtime_context().get_node_id()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types for it
        [node] = [node for node in nodes if node["NodeID"] == here]  # nodes that were removed are listed, too
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, TimeoutError):
            return False
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_twotower_") and sample.labels["job_name"] == "small":
                    label = sample.labels.get("replica") or sample.labels.get("kind") or "-"
                    last.setdefault(sample.name, {})[label] = sample.value
        return enough(last)

    wait_until(look, lambda: last, pause_s=0.2)
    return last
