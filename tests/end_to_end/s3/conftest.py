"""Gives each test a folder of its own on the S3 server, and a proxy before the server if it asks for one."""

from collections.abc import Iterator

import pytest

from pipeline.storage import retrying
from tests.end_to_end.s3.fault_proxy import FaultProxy, fault_proxy
from tests.end_to_end.s3.server import BUCKET, aws_variables


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL of an S3 folder for this test, with credentials and endpoint in the usual AWS variables."""
    from s3fs import S3FileSystem

    for name, value in aws_variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    S3FileSystem.clear_instance_cache()  # instances remember the endpoint and credentials that they were made with
    monkeypatch.setattr(retrying, "_answered", set())  # every test begins with a store that has never answered
    name = "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in request.node.name)
    yield f"s3://{BUCKET}/{name}"  # without brackets, which would make it a glob
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(
    s3: str,  # noqa: ARG001 (it sets the credentials)
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[FaultProxy]:
    """Yield a proxy that the S3 client of this test goes through."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retrying, "LONGEST_WAIT_S", 0.05)
    with fault_proxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        S3FileSystem.clear_instance_cache()
        yield running
        S3FileSystem.clear_instance_cache()
