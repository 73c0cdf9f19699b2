"""Makes the pools, benches, generators, sinks and checks of package workers for the commands. No other file of pipeline
imports workers."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # heavy modules are imported inside the command that needs them, so that --help and status start fast
    from pipeline.calibration.bench import Bench
    from pipeline.checks.findings import Check
    from pipeline.cli.signals import StopSignals
    from pipeline.config.job import Job
    from pipeline.driver.dispatcher import Pool
    from pipeline.monitoring.reporter import Sink
    from pipeline.planning.plan import Plan
    from pipeline.preview.generator import Generator


@contextmanager
def _own_handlers(signals: "StopSignals") -> "Iterator[None]":
    """Install the signal handlers before and after the `with` block, because Ray, which starts in it, replaces them."""
    signals.install()
    yield
    signals.install()


def make_pool(
    job: "Job",
    local: bool,
    signals: "StopSignals",
    plan: "Plan",
    units: int,
    tell: Callable[[str], None],
    *,
    json_logs: bool,
) -> "Pool":
    """Return the pool that runs a plan: on Ray, or with `local` as one replica in this process.

    `units`: the number of units left. `tell` shows the operator a message. `json_logs`: replicas log JSON.
    Raises ClusterError if Ray cannot be used.
    """
    with _own_handlers(signals):
        from workers.replica.build import ReplicaSpec, make_runner

        spec = ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts, json_logs)
        maker = functools.partial(make_runner, spec)
        if local:
            from workers.replica.local_pool import LocalPool

            return LocalPool(maker)
        from workers.cluster.pool import RayPool

        return RayPool(maker, job.workers, units, tell, signals.stop.is_set)


def make_bench(local: bool, signals: "StopSignals", job: "Job") -> "Bench":
    """Return the bench that measures a calibration: on Ray, or with `local` in this process.

    Raises ClusterError if Ray cannot be used.
    """
    with _own_handlers(signals):
        from workers.replica.bench import ReplicaBench

        if local:
            return ReplicaBench(job)
        from workers.cluster.bench import RayBench

        return RayBench(job, ReplicaBench, signals.stop.is_set)


def make_generator(local: bool, signals: "StopSignals", job: "Job") -> "Generator":
    """Return the generator of a preview: on Ray, or with `local` in this process.

    Raises ClusterError if Ray cannot be used.
    """
    with _own_handlers(signals):
        from workers.replica.generator import ReplicaGenerator

        if local:
            return ReplicaGenerator(job)
        from workers.cluster.bench import RayGenerator

        return RayGenerator(job, ReplicaGenerator, signals.stop.is_set)


def make_sinks(job: "Job", local: bool) -> "list[Sink]":
    """Return the sinks that receive the state of a run: Ray's metrics, or none if the job runs locally without Ray."""
    if local:
        return []
    from workers.cluster.metrics import RayMetrics

    return [RayMetrics(job.name or "")]


def canary_maker() -> Callable[..., list[str]]:
    """Return the function that makes a canary.json: workers.checks.canary.make_canary."""
    from workers.checks.canary import make_canary

    return make_canary


def device_and_cluster_checks(job: "Job | None") -> "list[Check]":
    """Return the checks of the command doctor that need torch or Ray."""
    from workers.checks.devices import device_checks
    from workers.cluster.checks import cluster_checks

    return [*device_checks(job), *cluster_checks(job)]
