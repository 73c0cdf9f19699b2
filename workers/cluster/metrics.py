"""Exports the run's numbers as Prometheus metrics through Ray; each node's agent serves them at its metrics port.

The driver sets them from the reports that it gets anyway. A counter therefore continues when a replica is replaced, the
gauges of a lost replica are set to 0, and the model processes have no extra work. Ray puts `ray_` before each name. The
label `replica` names the place of a replica (r0 also for its replacement r0.2), which limits the number of series in a
job that lost many replicas.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.monitoring.live import Live, LiveReplica

JOB, REPLICA, KIND = "job_name", "replica", "kind"  # not "job": Prometheus sets that label itself
COUNTERS = {
    "twotower_rows_total": ("Rows finished by replicas, error rows and repeated work included.", (REPLICA,)),
    "twotower_prompt_tokens_total": ("Prompt tokens of the finished rows.", (REPLICA,)),
    "twotower_tokens_total": ("Completion tokens of the finished rows.", (REPLICA,)),
    "twotower_denoiser_forwards_total": ("Denoiser forwards of the finished rows, added up.", (REPLICA,)),
    "twotower_batched_rows_total": ("Finished rows that the engine generated.", (REPLICA,)),
    "twotower_batch_rows_total": (
        "Mean number of rows computed together, added up over the generated rows.",
        (REPLICA,),
    ),
    "twotower_prefill_tokens_total": ("Prompt tokens put through the context tower.", (REPLICA,)),
    "twotower_prefill_padded_tokens_total": (
        "Prompt tokens put through the context tower, padding included.",
        (REPLICA,),
    ),
    "twotower_preemptions_total": ("Rows queued again because pages of the context cache ran out.", (REPLICA,)),
    "twotower_error_rows_total": ("Error rows by kind, repeated work included.", (KIND,)),
    "twotower_retries_total": (
        "Retries of a kind: of a forward, of rows that loop, of storage requests, of units.",
        (KIND,),
    ),
    "twotower_replicas_lost_total": ("Replicas that were lost or did not start.", ()),
}
"""Metrics that only grow: by name, (description, labels besides JOB)."""
GAUGES = {
    "twotower_tokens_per_second": ("Completion tokens per second over the last minute.", (REPLICA,)),
    "twotower_rows_per_second": ("Rows per second over the last minute.", (REPLICA,)),
    "twotower_tokens_per_forward": ("Tokens that a denoiser forward adds to a row, over the last minute.", (REPLICA,)),
    "twotower_batch_rows": ("Mean number of rows computed together, over the last minute.", (REPLICA,)),
    "twotower_padding_share": ("Share of padding in prefill, over the last minute.", (REPLICA,)),
    "twotower_queue_rows": ("Rows that are read and wait for a slot.", (REPLICA,)),
    "twotower_active_rows": ("Rows in slots.", (REPLICA,)),
    "twotower_slots_used": ("Slots of the context cache in use.", (REPLICA,)),
    "twotower_slots": ("Slots of the context cache.", (REPLICA,)),
    "twotower_pages_used": ("Pages of the context cache in use.", (REPLICA,)),
    "twotower_pages": ("Pages of the context cache.", (REPLICA,)),
    "twotower_unsaved_rows": ("Finished rows that are in no segment yet.", (REPLICA,)),
    "twotower_checkpoint_age_seconds": (
        "Seconds since the last flush of the unit that has waited longest for one.",
        (REPLICA,),
    ),
    "twotower_report_age_seconds": ("Seconds since the last report of the replica.", (REPLICA,)),
    "twotower_replicas": ("Replicas that have loaded their model.", ()),
    "twotower_job_rows_done": ("Rows of the job that are done, earlier runs included.", ()),
    "twotower_job_rows": ("Rows of the job.", ()),
    "twotower_job_error_rows": ("Error rows of the job.", ()),
    "twotower_job_units_done": ("Units of the job that are published.", ()),
    "twotower_job_units": ("Units of the job.", ()),
    "twotower_job_eta_seconds": ("Seconds left at the rate of the last minute; -1 if unknown.", ()),
}
"""Metrics that show a present value: by name, (description, labels besides JOB)."""
Key = tuple[str, str]
"""A metric and its label: (metric name, replica or kind), with "" if the metric has no such label."""


class RayMetrics:
    """A pipeline.monitoring.reporter.Sink that sets Ray's metrics. It does nothing while Ray is not connected."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._metrics: dict[str, Any] = {}
        self._counted: dict[str, Mapping[Key, float]] = {}  # last counts by replica name ("" for the run)
        self._shown: set[Key] = set()

    def __call__(self, live: Live) -> None:
        """Add what was counted since the last call to the counters, and set the gauges."""
        ray = sys.modules.get("ray")  # not imported here: the pool imports it, and the import is slow
        if ray is None or not ray.is_initialized():
            return
        for owner, counts in _counts(live).items():
            before = self._counted.get(owner, {})
            for key, value in counts.items():
                if (more := value - before.get(key, 0.0)) > 0:
                    self._metric(key[0]).inc(more, tags=self._tags(key))
            self._counted[owner] = counts
        values = dict(_gauges(live))
        for key in self._shown - values.keys():  # gauges of a replica that is gone
            self._metric(key[0]).set(0.0, tags=self._tags(key))
        for key, value in values.items():
            self._metric(key[0]).set(value, tags=self._tags(key))
        self._shown = set(values)

    def _metric(self, name: str) -> Any:
        """Return Ray's metric of this name, made at its first use."""
        if name not in self._metrics:
            from ray.util.metrics import Counter, Gauge

            maker, (text, tags) = (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES[name])
            self._metrics[name] = maker(name, description=text, tag_keys=(JOB, *tags))
        return self._metrics[name]

    def _tags(self, key: Key) -> dict[str, str]:
        name, label = key
        tags = (COUNTERS.get(name) or GAUGES[name])[1]
        return {JOB: self._job, **dict.fromkeys(tags, label)}


def _counts(live: Live) -> dict[str, dict[Key, float]]:
    """Return the counts so far by replica name ("" for the run). The counts of one name never fall."""
    found: dict[str, dict[Key, float]] = defaultdict(dict)
    found[""] = {
        ("twotower_replicas_lost_total", ""): live.replicas_lost,
        ("twotower_retries_total", "unit"): live.unit_retries,
        **{("twotower_error_rows_total", count.kind): count.rows for count in live.error_kinds},
    }
    for replica in live.replicas:
        stats, place = replica.stats, _place(replica)
        found[replica.name] = {
            ("twotower_rows_total", place): stats.rows,
            ("twotower_prompt_tokens_total", place): stats.prompt_tokens,
            ("twotower_tokens_total", place): stats.tokens,
            ("twotower_denoiser_forwards_total", place): stats.forwards,
            ("twotower_batched_rows_total", place): stats.batched,
            ("twotower_batch_rows_total", place): stats.batch_rows,
            ("twotower_prefill_tokens_total", place): stats.room.prefill_tokens,
            ("twotower_prefill_padded_tokens_total", place): stats.room.padded_tokens,
            ("twotower_preemptions_total", place): stats.room.preemptions,
            ("twotower_retries_total", "forward"): stats.forward_retries,
            ("twotower_retries_total", "loop"): stats.loop_retries,
            ("twotower_retries_total", "storage"): stats.storage_retries,
        }
    return found


def _gauges(live: Live) -> Iterator[tuple[Key, float]]:
    """Yield the present value of each gauge."""
    for replica in live.replicas:
        stats = replica.stats
        values = {
            "twotower_tokens_per_second": replica.tokens_per_s,
            "twotower_rows_per_second": replica.rows_per_s,
            "twotower_tokens_per_forward": replica.tokens_per_forward,
            "twotower_batch_rows": replica.batch_rows,
            "twotower_padding_share": replica.padding_share,
            "twotower_queue_rows": stats.queue,
            "twotower_active_rows": stats.active,
            "twotower_slots_used": stats.room.slots_used,
            "twotower_slots": stats.room.slots,
            "twotower_pages_used": stats.room.pages_used,
            "twotower_pages": stats.room.pages,
            "twotower_unsaved_rows": stats.unsaved_rows,
            "twotower_checkpoint_age_seconds": stats.unsaved_s,
            "twotower_report_age_seconds": max(0.0, live.sampled - replica.heard),
        }
        yield from (((name, _place(replica)), value) for name, value in values.items())
    of_job = {
        "twotower_replicas": len(live.replicas),
        "twotower_job_rows_done": live.rows,
        "twotower_job_rows": live.total_rows,
        "twotower_job_error_rows": live.errors,
        "twotower_job_units_done": live.units,
        "twotower_job_units": live.total_units,
        "twotower_job_eta_seconds": -1.0 if live.eta_s is None else live.eta_s,
    }
    yield from (((name, ""), value) for name, value in of_job.items())


def _place(replica: LiveReplica) -> str:
    """Return the label of a replica's place: r0 for r0 and for each of its replacements, such as r0.2."""
    return replica.name.partition(".")[0]
