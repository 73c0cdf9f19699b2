"""Runs a proxy in front of the S3 server that injects the faults of networks and busy stores.

Faults are scripted for requests of one method and name, or come at random with a seed and a rate.
"""

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = {
    "503": "answered busy, and the server never sees it",
    "500": "answered as an internal error, and the server never sees it",
    "reset": "the connection is reset before the server sees it",
    "lost": "it reaches the server, whose answer is cut off",
    "slow": "the answer's body drips",
    "cut": "half of the answer's body comes, and then the end, though its length says more",
    "short": "half of the answer's body comes, under a length that says so",
    "hang": "the server never sees it, and no answer comes until the client gives up",
    "flip": "one bit of the answer's body is flipped",
    "fewer": "every second entry of a listing is missing, though its count of entries includes them",
    "unseen": "every second entry of a listing is missing, and its count of entries as well",
    "empty": "a listing has no entries",
    "endless": "the rest of a listing is missing, and it says that another page follows, but not where",
    **dict.fromkeys(
        ("denied", "expired", "unknown-key", "skewed", "redirect"), "refused, and the server never sees it"
    ),
}
RANDOM_FAULTS: tuple[str, ...] = ("503", "500", "reset", "lost", "slow", "cut", "short")
REFUSALS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "unknown-key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "skewed": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
    "redirect": (
        301,
        "PermanentRedirect",
        "The bucket you are attempting to access must be addressed using the specified endpoint.",
    ),
}
"""The faults that are answers without the server: status, code and message. To HEAD, only the status is an answer."""
DRIPS, DRIP_S = 8, 0.02
HANG_S = 60.0

Headers = list[tuple[str, str]]


class FaultProxy(ThreadingHTTPServer):
    """A proxy that forwards requests and fails some of them; FAULTS describes the kinds.

    `injected` counts the faults by kind, `requests` all requests by method.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.drip_s = DRIP_S
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.faults: list[str] = []
        """Scripted faults that are left."""
        self.spoil: Callable[[str, str, bytes], bytes] | None = None
        """A function that is called with the path, the header Range and the content of each answer to a GET that works,
        and returns the content that is sent in its place."""
        self._method, self._ending = "", ""
        self._random, self._rate, self._kinds = random.Random(), 0.0, RANDOM_FAULTS
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, method: str, ending: str, faults: Sequence[str]) -> None:
        """Let the next requests of this method whose path ends with `ending` fail, one for each fault of the list."""
        self._method, self._ending, self.faults = method, ending, list(faults)

    def fail_at_random(self, seed: int, rate: float, kinds: Sequence[str] = RANDOM_FAULTS) -> None:
        """Let a share `rate` of all requests fail from now on."""
        with self._lock:
            self._random, self._rate, self._kinds = random.Random(seed), rate, tuple(kinds)

    def next_fault(self, method: str, path: str) -> str:
        """Return the fault of a request that has just come, or "" if it should work."""
        with self._lock:
            self.requests[method] += 1
            if self.faults and method == self._method and urlsplit(path).path.endswith(self._ending):
                return self.faults.pop(0)
            if self._rate and self._random.random() < self._rate:
                return self._random.choice(self._kinds)
            return ""

    def count(self, fault: str) -> None:
        with self._lock:
            self.injected[fault] += 1

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(self.command, self.path)
        if fault in REFUSALS or fault in ("reset", "hang"):
            self.server.count(fault)
            if fault in REFUSALS:
                status, code, message = REFUSALS[fault]
                error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                content = b"" if self.command == "HEAD" else error
                self._answer(status, [("Content-Type", "application/xml")], content)
            else:
                self._hang_up(HANG_S if fault == "hang" else 0.0)
            return
        status, headers, content = self._forward(body)
        if (spoil := self.server.spoil) and self.command == "GET" and status in (200, 206):
            content = spoil(urlsplit(self.path).path, self.headers.get("Range") or "", content)
        if fault == "lost":
            self.server.count(fault)
            self._hang_up()
        elif fault and self.command == "GET" and len(content) > 1:
            self.server.count(fault)
            self._answer_badly(fault, status, headers, content)
        else:
            self._answer(status, headers, content)

    def _forward(self, body: bytes) -> tuple[int, Headers, bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host stays unchanged: the signature covers it
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer_badly(self, fault: str, status: int, headers: Headers, content: bytes) -> None:
        half = content[: len(content) // 2]
        if fault == "short":
            true = [(name, value) for name, value in headers if name.lower() != "content-length"]
            self._answer(status, true, half)
        elif fault == "flip":
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            self._answer(status, headers, flipped)
        elif fault in ("fewer", "unseen", "empty", "endless"):
            true = [(name, value) for name, value in headers if name.lower() != "content-length"]
            self._answer(status, true, shorten_listing(fault, content))
        elif fault == "cut":
            self._answer(status, headers, half)
            self._hang_up()
        else:
            self._answer(status, headers, content[:0])
            size = -(-len(content) // DRIPS)
            for start in range(0, len(content), size):
                time.sleep(self.server.drip_s)
                self.wfile.write(content[start : start + size])

    def _answer(self, status: int, headers: Headers, content: bytes) -> None:
        """Send an answer. A Content-Length in `headers` is kept even if `content` has another length, as for HEAD."""
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() in ("transfer-encoding", "connection"):
                continue
            if name.lower() == "content-length":
                length = value
            else:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self, after_s: float = 0.0) -> None:
        self.close_connection = True
        if after_s:
            self.connection.settimeout(after_s)
            self.rfile.read(1)  # returns when the client hangs up
        else:  # closing then resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


def shorten_listing(fault: str, content: bytes) -> bytes:
    """Return an answer to ListObjectsV2 without some of its entries: a fault of FAULTS."""
    entries = re.findall(rb"<Contents>.*?</Contents>", content, re.DOTALL)
    left_out = {"endless": entries[len(entries) // 2 :], "empty": entries}.get(fault, entries[1::2])
    for entry in left_out:
        content = content.replace(entry, b"", 1)
    if fault in ("unseen", "empty"):
        content = re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % (len(entries) - len(left_out)), content)
    if fault == "endless":
        content = content.replace(b"<IsTruncated>false", b"<IsTruncated>true")
    return content


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Yield a running proxy in front of the server with this URL."""
    with FaultProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
