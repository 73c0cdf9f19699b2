"""What `doctor` looks at with torch and with Ray: devices, kernels, the memory plan of a job, the cluster."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from model.errors import TwoTowerError
from model.faults import first_line
from pipeline.doctor.findings import Check, Finding, fail, ok, warn
from pipeline.doctor.machine import NEW_TOKEN, ROOT, answer, token_source
from pipeline.job import Job
from pipeline.paths import safe_url

if TYPE_CHECKING:
    from model import TwoTower

GIB = 1 << 30
JOIN_S = 60.0
"""Seconds for joining a Ray cluster."""
BUSY = 0.1
"""Share of a GPU's memory that is in use when the operator is told."""
RELEASED_LAYERS = 4 * GIB
"""Free memory of a GPU below which layers of the released size cannot be checked: weights, and what checking takes."""
OLDEST = (8, 0)
"""Compute capability of the first GPUs that compute in bfloat16."""
NO_GPU = "set workers.gpus: 0 to run on the CPU; else see whether `nvidia-smi` works and torch is built for CUDA"
PREFILL_SCAN = "ops/triton/ssd_combined.py"
JOIN = "from workers.cluster import print_nodes; print_nodes()"


def device_checks(job: Job | None) -> list[Check]:
    """What this machine computes with. Loading torch and making a context on each GPU take their time."""
    checks = [
        Check("torch", check_torch, seconds=120),
        Check("memory", check_memory),
        Check("gpus", functools.partial(check_gpus, job), seconds=120),
        Check("kernels", check_kernels, seconds=600),  # a GPU's are compiled first
    ]
    return checks + ([Check("plan", functools.partial(check_plan, job), seconds=120)] if job else [])


def cluster_checks(job: Job | None) -> list[Check]:
    """The Ray cluster that RAY_ADDRESS names."""
    return [Check("ray", functools.partial(check_cluster, job, os.environ.get("RAY_ADDRESS")), seconds=JOIN_S + 30)]


def check_torch() -> Iterator[Finding]:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"torch {torch.__version__}, {built}; Triton {_version('triton') or 'none'}"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        yield warn(f"{found}, on a machine with an NVIDIA driver", "install a build of torch for CUDA")
    else:
        yield ok(found)


def check_memory() -> Iterator[Finding]:
    from model.weights import free_memory

    free = free_memory("cpu")
    found = f"{free / GIB:.1f} GiB free on the host, {os.cpu_count()} CPU cores"
    yield ok(found) if free >= 2 * GIB else warn(found, "a replica takes 1 GiB and more: stop what else runs here")


def check_gpus(job: Job | None) -> Iterator[Finding]:
    """A line a GPU. Makes a context on each."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        found = "none: CPU only, for the built-in models"
        yield ok(f"{found}, and the job asks for none") if job and not job.workers.gpus else warn(found, NO_GPU)
        return
    driver = _driver()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = properties.major, properties.minor
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"cuda:{index} {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability "
            f"{capability[0]}.{capability[1]}, driver {driver}"
        )
        if capability < OLDEST:
            yield warn(f"{found}: no bfloat16", "use an Ampere GPU or a later one, or model.dtype: float32")
        elif total - free > BUSY * total:
            yield warn(f"{found}: others hold the rest", "see `nvidia-smi`, and stop what else runs there")
        else:
            yield ok(found)


def check_kernels() -> Iterator[Finding]:
    """On each device: which kernels it would use, and whether they compute what they must: on builtin:noise, and on a
    GPU at the released model's sizes as well."""
    import torch

    gpus = torch.cuda.device_count()
    torch.set_num_threads(1)  # small sums: with more, threads wait for each other
    yield from (_check_kernels_on(device) for device in ("cpu", *(f"cuda:{index}" for index in range(gpus))))
    spec = find_spec("mamba_ssm")
    folders = spec.submodule_search_locations if spec else None
    if any(os.path.isfile(os.path.join(folder, PREFILL_SCAN)) for folder in folders or ()):
        yield ok(f"mamba-ssm {_version('mamba-ssm')} has its Triton scan for prompts")
    elif gpus:
        yield warn(
            "mamba-ssm is not installed: prompts are read more slowly",
            "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm",
        )


def _check_kernels_on(device: str) -> Finding:
    import torch

    from model import load_model
    from model.kernels import kernels_for
    from model.kernels.check import check_kernels as compare

    name, took = type(kernels_for(torch.device(device))).__name__, dict[str, float]()
    dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        pair = load_model("builtin:noise", dtype, [device])
        took["small"] = _seconds(lambda: compare(pair))
        if device != "cpu":
            released = _released_layers(device)
            took["released"] = _seconds(lambda: compare(released))
    except TwoTowerError as error:  # it says what to do
        return fail(f"{device}: {error}")
    except Exception as error:  # a compiler or a device may raise anything
        text = f"{device}: {name} failed: {type(error).__name__}: {first_line(error)}"
        return fail(text, "compare driver, torch and Triton with a machine where they run, or set workers.gpus: 0")
    compared = ", ".join(f"{seconds:.1f} s for {size} sizes" for size, seconds in took.items())
    return ok(f"{device}: {name}, right in {dtype}, compiled and compared in {compared}")


def _released_layers(device: str) -> "TwoTower":
    """A layer of each kind of the released model's context tower, 2.6 GiB of random weights, with a small vocabulary.

    Raises RequestError where the device has no room for them.
    """
    import torch

    from model.errors import RequestError
    from model.random_weights import random_pair
    from model.released import RELEASED_CONFIG
    from model.weights import free_memory

    if (free := free_memory(device)) < RELEASED_LAYERS:
        raise RequestError(
            f"{free / GIB:.1f} GiB are free, too few for a layer of each kind at the released sizes "
            f"({RELEASED_LAYERS / GIB:.0f} GiB): stop what else runs there"
        )
    config = replace(RELEASED_CONFIG, layer_kinds=("mamba", "attention", "moe"), vocab_size=512)
    return random_pair(config, torch.bfloat16, [torch.device(device)], "context")


def _seconds(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def check_plan(job: Job) -> Iterator[Finding]:
    """Whether the weights fit the devices of a replica, and how many rows beside them."""
    import torch

    from model.checkpoint import open_checkpoint
    from model.fit import stage_weights
    from model.memory import make_plan
    from model.two_tower import DTYPES
    from model.weights import check_memory, free_memory

    gpus, found = job.workers.gpus, torch.cuda.device_count()
    if gpus > found:
        text = f"a replica asks for {gpus} GPU, {found} are here"
        if os.environ.get("RAY_ADDRESS"):
            yield warn(
                f"{text}, and the cluster may have them", "run doctor on a GPU node: ray job submit … doctor JOB"
            )
        else:
            yield fail(text, "lower workers.gpus, 0 is the CPU, or set RAY_ADDRESS")
        return
    names = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    checkpoint, towers, dtype = open_checkpoint(job.model.checkpoint), job.generation.towers, DTYPES[job.model.dtype]
    weights, stages = stage_weights(checkpoint.config, dtype, names, towers)
    check_memory(checkpoint, towers, dtype, names, weights)
    free = {name: free_memory(name) - need for name, need in zip(names, weights, strict=True)}
    held = dict(zip(names, weights, strict=True))
    plan = make_plan(checkpoint.config, dtype, stages, held, free, job.engine.limits())
    left = min(device.left(plan.max_rows, plan.kv_tokens) for device in plan.devices)
    yield ok(
        f"{max(weights) / GIB:.2f} GiB of weights at most on each of {', '.join(names)}; max_rows {plan.max_rows}, "
        f"kv_tokens {plan.kv_tokens:,}; {left / GIB:.1f} GiB left then"
    )


def check_cluster(job: Job | None, address: str | None) -> Iterator[Finding]:
    """Whether a cluster is there, asks for a token, and has room for a replica."""
    if not address:
        yield ok(f"Ray {_version('ray')}; RAY_ADDRESS is not set: `run` starts a Ray of its own on this machine")
    elif address.startswith(("http://", "https://")):
        yield _job_server(address)
    else:
        yield _cluster(job, address)


def _job_server(address: str) -> Finding:
    """As `ray job submit` would meet it."""
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
    theirs, ours = json.loads(body).get("ray_version"), _version("ray")
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
    """Joined by a process of its own, which can be ended."""
    from workers.cluster import amounts, check_reachable

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
    """Ray's token. Never shown."""
    from pipeline.storage import read_text

    if source == "RAY_AUTH_TOKEN":
        return os.environ["RAY_AUTH_TOKEN"]
    return read_text(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")).strip()


def _driver() -> str:
    """The NVIDIA driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines[0] if lines else "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
