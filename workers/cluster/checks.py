"""Provides the check of `doctor` for Ray: for the cluster or the job server that RAY_ADDRESS names."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from pipeline.checks.findings import Check, Finding, fail, ok, warn
from pipeline.checks.machine import NEW_TOKEN, ROOT, answer, installed_version, token_source
from pipeline.config.job import Job
from pipeline.storage.urls import safe_url

JOIN_S = 60.0
"""Time limit for joining a Ray cluster, in seconds."""

JOIN = "from workers.cluster.connection import print_nodes; print_nodes()"
"""The Python program that joins the cluster, in a process of its own."""


def cluster_checks(job: Job | None) -> list[Check]:
    """Return the check of what RAY_ADDRESS names, as the only item of a list."""
    return [Check("ray", functools.partial(check_cluster, job, os.environ.get("RAY_ADDRESS")), seconds=JOIN_S + 30)]


def check_cluster(job: Job | None, address: str | None) -> Iterator[Finding]:
    """Check the Ray at `address`: whether a cluster can be joined and has a node that is large enough for a replica of
    the job, or whether a job server answers and asks for a token. None or "": only report the version of Ray."""
    if not address:
        yield ok(
            f"Ray {installed_version('ray')}; RAY_ADDRESS is not set: `run` starts a Ray of its own on this machine"
        )
    elif address.startswith(("http://", "https://")):
        yield _job_server(address)
    else:
        yield _cluster(job, address)


def _job_server(address: str) -> Finding:
    """Check the job server at `address` with the token that `ray job submit` would use. Raises ValueError if it answers
    with something other than JSON."""
    shown, url = safe_url(address), f"{address.rstrip('/')}/api/version"
    try:
        status, _, body = answer(url)
        if status in (401, 403):
            source = token_source(os.environ)
            if source is None:
                return fail(
                    f"{shown} asks for a token, and there is none here", f"set RAY_AUTH_MODE=token; {NEW_TOKEN}"
                )
            status, _, body = answer(url, _token(source))
            if status in (401, 403):
                return fail(f"{shown} refuses the token of {source}", "use the token of the cluster")
            asks = f"asks for a token and takes that of {source}"
        else:
            asks = ""
    except OSError as error:
        return fail(f"no job server answers at {shown}: {error}", "start it, or set RAY_ADDRESS to where it is")
    if status != 200:
        return fail(f"{shown} answers with status {status}", "set RAY_ADDRESS to Ray's job server, port 8265")
    theirs, ours = json.loads(body).get("ray_version"), installed_version("ray")
    if theirs != ours:
        return warn(
            f"job server at {shown} runs Ray {theirs}, here is {ours}", "install the same version on both sides"
        )
    if not asks:
        return warn(
            f"job server at {shown}, Ray {theirs}, asks for no token: whoever reaches it can run code",
            f"set RAY_AUTH_MODE=token on all nodes and here; {NEW_TOKEN}",
        )
    return ok(f"job server at {shown}, Ray {theirs}, {asks}")


def _cluster(job: Job | None, address: str) -> Finding:
    """Check the cluster by joining it from a separate process, which is killed if it takes longer than JOIN_S. Raises
    ClusterError if nothing answers at `address`."""
    from workers.cluster.connection import amounts, check_reachable

    check_reachable(address)
    environ = {**os.environ, "RAY_ADDRESS": address}
    try:
        joined = subprocess.run(
            [sys.executable, "-c", JOIN],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=JOIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return fail(f"the cluster at {address} was not joined within {JOIN_S:g} s", "see `ray status` on its head node")
    if joined.returncode:
        why = (joined.stderr.strip().splitlines() or ["no reason given"])[-1]
        return fail(
            f"the cluster at {address} cannot be joined: {why}", "compare RAY_AUTH_MODE and Ray's version there"
        )
    nodes = json.loads(joined.stdout.strip().splitlines()[-1])
    found = f"cluster at {address}: {'; '.join(map(amounts, nodes))}"
    wanted = {"GPU": job.workers.gpus, "CPU": job.workers.cpus} if job else {}
    if not any(all(node.get(kind, 0) >= count for kind, count in wanted.items()) for node in nodes):
        return fail(f"{found}; no node has {amounts(wanted)} for a replica", "lower workers.gpus or workers.cpus")
    return ok(found)


def _token(source: str) -> str:
    """Return Ray's token from the place that token_source named. The token must never be shown."""
    from pipeline.storage.storage import read_text

    if source == "RAY_AUTH_TOKEN":
        return os.environ["RAY_AUTH_TOKEN"]
    return read_text(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")).strip()
