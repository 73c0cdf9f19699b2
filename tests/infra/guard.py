"""Puts an IAM policy in front of a real S3 server: a request that it does not allow is answered as by AWS.

A request for a missing object also needs s3:ListBucket with the key as the prefix: without it S3 answers 403 instead of
404, so that it does not reveal that nothing is there.
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
    """One action on one resource. `prefix` is what a listing asks for; only a listing has one."""

    action: str
    arn: str
    prefix: str | None = None


@dataclass(frozen=True)
class Grant:
    """One action that the policy allows on one resource and, for a listing, with one prefix."""

    action: str
    arn: str
    prefix: str | None = None

    def allows(self, access: Access) -> bool:
        """Return whether the grant allows the access. As in IAM, letters must match and `*` stands for any letters."""
        if access.action != self.action or not fnmatch.fnmatchcase(access.arn, self.arn):
            return False
        return self.prefix is None or (access.prefix is not None and fnmatch.fnmatchcase(access.prefix, self.prefix))


def grants_of(policy: Path) -> list[Grant]:
    """Return the grants of a policy. Raises AssertionError if the policy has parts that this module does not know."""
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
    """Return the access that a request needs. Raises ValueError for a request that this module does not know."""
    url = urlsplit(path)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    if key and method in ACTIONS and not query.keys() - {"x-id"}:
        return Access(ACTIONS[method], f"arn:aws:s3:::{bucket}/{key}")
    if not key and method == "GET" and "list-type" in query:
        return Access("s3:ListBucket", f"arn:aws:s3:::{bucket}", query.get("prefix", [""])[0])
    raise ValueError(f"{method} {path}: which action of S3 is it?")


class Guard(FaultProxy):
    """A proxy with a policy. `denied`: the requests answered with 403; `used`: the grants that allowed a request."""

    def __init__(self, upstream: str, grants: Sequence[Grant]) -> None:
        super().__init__(upstream)
        self.RequestHandlerClass: Any = _GuardHandler
        self.grants = grants
        self.used: set[Grant] = set()
        self.denied: list[str] = []

    def allows(self, access: Access) -> bool:
        """Return whether any grant allows the access, and note those that do as used."""
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
    """Yield a running guard in front of the server with this URL."""
    with Guard(upstream, grants) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
