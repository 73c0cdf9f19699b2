"""An IAM policy in front of a real S3 server: what it does not allow is answered as AWS would.

A request for an object that is not there needs s3:ListBucket with the key as the prefix besides: without it S3 answers
403, not 404, and does not tell that there is nothing.
"""

import fnmatch
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.end_to_end.s3.fault_proxy import FaultProxy, Headers, _Handler

ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass(frozen=True)
class Access:
    """One action on one thing; `prefix` is what a listing asks for, and only a listing has one."""

    action: str
    arn: str
    prefix: str | None = None


@dataclass(frozen=True)
class Grant:
    """One action on one resource, and where it is a listing, one prefix."""

    action: str
    arn: str
    prefix: str | None = None

    def allows(self, access: Access) -> bool:
        """As IAM decides: letters as they are, `*` for any."""
        if access.action != self.action or not fnmatch.fnmatchcase(access.arn, self.arn):
            return False
        return self.prefix is None or (access.prefix is not None and fnmatch.fnmatchcase(access.prefix, self.prefix))


def grants_of(policy: Path) -> list[Grant]:
    """A policy taken apart. Raises AssertionError where it says what is not understood here."""
    document = json.loads(policy.read_text())
    assert document.keys() == {"Version", "Statement"}
    assert document["Version"] == "2012-10-17"
    grants = []
    for statement in document["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Allow"
        prefixes: list[str | None] = [None]
        if "Condition" in statement:
            assert statement["Condition"].keys() == {"StringLike"}
            assert statement["Condition"]["StringLike"].keys() == {"s3:prefix"}
            prefixes = list(statement["Condition"]["StringLike"]["s3:prefix"])
        for action in _listed(statement["Action"]):
            grants += [Grant(action, arn, prefix) for arn in _listed(statement["Resource"]) for prefix in prefixes]
    return grants


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def access_of(method: str, path: str) -> Access:
    """What a request needs. Raises ValueError for one that nobody has thought of."""
    url = urlsplit(path)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    if key and method in ACTIONS and not query.keys() - {"x-id"}:
        return Access(ACTIONS[method], f"arn:aws:s3:::{bucket}/{key}")
    if not key and method == "GET" and "list-type" in query:
        return Access("s3:ListBucket", f"arn:aws:s3:::{bucket}", query.get("prefix", [""])[0])
    raise ValueError(f"{method} {path}: which action of S3 is it?")


class Guard(FaultProxy):
    """`denied` are the requests that were answered 403, `used` the grants that allowed another."""

    def __init__(self, upstream: str, grants: Sequence[Grant]) -> None:
        super().__init__(upstream)
        self.RequestHandlerClass: Any = _GuardHandler
        self.grants = grants
        self.used: set[Grant] = set()
        self.denied: list[str] = []

    def allows(self, access: Access) -> bool:
        """Whether any grant does; all that do count as used."""
        found = {grant for grant in self.grants if grant.allows(access)}
        self.used |= found
        return bool(found)


class _GuardHandler(_Handler):
    server: Guard

    def _forward(self, body: bytes) -> tuple[int, Headers, bytes]:
        access = access_of(self.command, self.path)
        if not self.server.allows(access):
            return self._deny()
        status, headers, content = super()._forward(body)
        if status == 404 and access.prefix is None:
            bucket, _, key = access.arn.partition("/")
            if not self.server.allows(Access("s3:ListBucket", bucket, key)):
                return self._deny()
        return status, headers, content

    def _deny(self) -> tuple[int, Headers, bytes]:
        self.server.denied.append(f"{self.command} {self.path}")
        content = b"" if self.command == "HEAD" else DENIED
        return 403, [("Content-Type", "application/xml")], content


@contextmanager
def guard(upstream: str, grants: Sequence[Grant]) -> Iterator[Guard]:
    """A running guard in front of the server with this URL."""
    with Guard(upstream, grants) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
