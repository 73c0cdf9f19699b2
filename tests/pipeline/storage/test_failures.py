"""Tests of what errors of the storage libraries mean: whether they may pass, and the text that helps."""

import errno
import ssl
from typing import Any

import pytest
from aiohttp import ClientConnectorCertificateError, ClientPayloadError
from aiohttp.client_reqrep import ConnectionKey
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    FlexibleChecksumError,
    IncompleteReadError,
    NoCredentialsError,
    SSLError,
)
from s3fs.errors import translate_boto_error

from pipeline.storage.failures import cause, hidden_failure, is_refusal, is_transient


def answer(code: str, status: int = 403, **more: Any) -> BaseException:
    """Return the error that s3fs makes of an answer with this code."""
    said = {"Error": {"Code": code, "Message": "Some text.", **more}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: BaseException = translate_boto_error(ClientError(said, "GetObject"))
    return error


KEY = ConnectionKey("host", 443, True, True, None, None, None)
CERTIFICATE = ssl.SSLCertVerificationError("certificate verify failed: self-signed certificate")
PASSES = {
    "slow down": answer("SlowDown", 503),
    "throttled": answer("Throttling", 400),
    "internal": answer("InternalError", 500),
    "timeout": answer("RequestTimeout", 400),
    "redirected for a while": answer("TemporaryRedirect", 307),
    "busy": answer("OperationAborted", 409),
    "damaged upload": answer("BadDigest", 400),
    "checksum of a download": FlexibleChecksumError(error_msg="Expected checksum a did not match"),
    "half of a download": IncompleteReadError(actual_bytes=1, expected_bytes=2),
    "payload": ClientPayloadError("Response payload is not completed"),
    "refused connection": EndpointConnectionError(endpoint_url="http://127.0.0.1:1/b/k"),
    "reset": ConnectionResetError("reset"),
    "stale handle": OSError(errno.ESTALE, "Stale file handle"),
    "no thread": RuntimeError("can't start new thread"),
    "no process": BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
}
REFUSED = {
    "denied": answer("AccessDenied"),
    "signature": answer("SignatureDoesNotMatch"),
    "expired": answer("ExpiredToken", 400),
    "expired token": answer("ExpiredTokenException", 400),
    "refresh": answer("TokenRefreshRequired", 400),
    "unknown key": answer("InvalidAccessKeyId"),
    "unknown token": answer("InvalidToken", 400),
    "clock": answer("RequestTimeTooSkewed"),
    "redirect": answer("PermanentRedirect", 301),
    "region": answer("AuthorizationHeaderMalformed", 400),
    "head 400": answer("400", 400),
    "head 403": answer("403"),
    "no credentials": NoCredentialsError(),
}
FINAL = {
    "missing": answer("NoSuchKey", 404),
    "no bucket": answer("NoSuchBucket", 404),
    "archived": answer("InvalidObjectState"),
    "account": answer("AccountProblem"),
    "certificate": ClientConnectorCertificateError(KEY, CERTIFICATE),
    "certificate of s3": SSLError(endpoint_url="https://x", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "memory": MemoryError(),
    "program": ZeroDivisionError(),
}


def parameters(errors: dict[str, BaseException]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("error", errors.values(), ids=errors.keys())


@parameters(PASSES)
def test_failures_of_the_moment_may_pass(error: BaseException) -> None:
    assert is_transient(error)
    assert not is_refusal(error)


@parameters(REFUSED)
def test_refusals_may_pass_only_where_it_was_allowed_before(error: BaseException) -> None:
    assert is_refusal(error)
    assert not is_transient(error)


@parameters(FINAL)
def test_what_stays_is_final(error: BaseException) -> None:
    assert not is_refusal(error)
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (REFUSED["expired"], "the credentials have expired (ExpiredToken); renew them and submit again"),
        (
            REFUSED["clock"],
            "this machine's clock and the store's are too far apart (RequestTimeTooSkewed); set the clock and submit "
            "again",
        ),
        (
            answer("PermanentRedirect", 301, Endpoint="b.s3.eu-west-1.amazonaws.com"),
            "the bucket is in another region or at another endpoint (b.s3.eu-west-1.amazonaws.com); set "
            "AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL, to that of the bucket",
        ),
        (
            answer("AuthorizationHeaderMalformed", 400, Region="eu-west-1"),
            "the bucket is in another region or at another endpoint (eu-west-1); set AWS_DEFAULT_REGION, or "
            "AWS_ENDPOINT_URL, to that of the bucket",
        ),
        (
            REFUSED["unknown key"],
            "the store does not know the access key or token (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID or "
            "AWS_PROFILE",
        ),
        (REFUSED["denied"], "permission denied; check the rights of the user or of the credentials"),
        (
            EndpointConnectionError(endpoint_url="http://user:secret@127.0.0.1:1/bucket/key?X-Amz-Signature=1"),
            "nothing answers at http://127.0.0.1:1; does the store run, and is AWS_ENDPOINT_URL right?",
        ),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
            "nothing answers; does the store run, and is the address right?",
        ),
        (
            FINAL["certificate of s3"],
            "the certificate of the endpoint is not trusted; check the endpoint, or set AWS_CA_BUNDLE to its authority",
        ),
        (FINAL["archived"], "it is archived; restore it to a storage class that can be read"),
        *(
            (
                error,
                "this machine or container has reached its limit of processes, threads or memory; raise the limit "
                "(pids, memory), or stop what else runs there",
            )
            for error in (PASSES["no thread"], PASSES["no process"], FINAL["memory"])
        ),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open; raise the limit (ulimit -n)"),
    ],
)
def test_texts_say_what_to_do(error: BaseException, said: str) -> None:
    assert cause(error) == said


def test_a_library_may_call_a_failure_a_missing_file() -> None:
    """fsspec does so for http. A file of S3 that is missing has an answer of S3 as its cause, and stays missing."""
    missing = FileNotFoundError("http://host/x")
    assert hidden_failure(missing) is None
    missing.__cause__ = refused = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    assert hidden_failure(missing) is refused
    missing.__cause__ = KeyError("x")
    assert hidden_failure(missing) is None
    assert hidden_failure(answer("NoSuchKey", 404)) is None
