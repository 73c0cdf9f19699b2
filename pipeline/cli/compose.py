"""Get from workers what commands need: pools, benches, checks. No other file of pipeline imports workers."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # everything heavier is imported by the command that needs it: --help and status start fast
    from pipeline.calibration.bench import Bench
    from pipeline.checks.findings import Check
    from pipeline.config.job import Job
    from pipeline.driver.dispatcher import Pool
    from pipeline.monitoring.telemetry import Sink
    from pipeline.planning.plan import Plan


def make_pool(
    job: "Job",
    local: bool,
    catch_signals: Callable[[], None],
    plan: "Plan",
    units: int,
    tell: Callable[[str], None],
    *,
    json_logs: bool,
) -> "Pool":
    """Return the pool that a plan runs on. Signals are caught again afterwards: Ray takes the handlers."""
    catch_signals()
    from workers.replica.build import ReplicaSpec, make_runner

    maker = functools.partial(make_runner, ReplicaSpec(job, plan.fingerprint.digest, plan.schema, json_logs))
    pool: Pool
    if local:
        from workers.replica.local_pool import LocalPool

        pool = LocalPool(maker)
    else:
        from workers.cluster.pool import RayPool

        pool = RayPool(maker, job.workers, units, tell)
    catch_signals()
    return pool


def make_bench(local: bool, catch_signals: Callable[[], None], job: "Job") -> "Bench":
    """Return the bench that a calibration measures with. Signals are caught again, since Ray takes the handlers."""
    catch_signals()
    from workers.replica.bench import ReplicaBench

    if local:
        return ReplicaBench(job)
    from workers.cluster.bench import RayBench

    bench = RayBench(job, ReplicaBench)
    catch_signals()
    return bench


def make_sinks(job: "Job", local: bool) -> "list[Sink]":
    """Return who else is told how a run goes: Ray's metrics, if there is a Ray."""
    if local:
        return []
    from workers.cluster.metrics import RayMetrics

    return [RayMetrics(job.name or "")]


def make_canary(
    checkpoint: str, *, prompts: Sequence[str], tokens: int, dtype: str, gpus: int, out: str | None, force: bool
) -> list[str]:
    """Write canary.json as workers.checks.canary does, which takes the same arguments."""
    from workers.checks.canary import make_canary

    return make_canary(checkpoint, prompts=prompts, tokens=tokens, dtype=dtype, gpus=gpus, out=out, force=force)


def device_and_cluster_checks(job: "Job | None") -> "list[Check]":
    """Return the checks of doctor that need torch or Ray."""
    from workers.checks.devices import device_checks
    from workers.cluster.checks import cluster_checks

    return [*device_checks(job), *cluster_checks(job)]
