"""Tells which errors of the storage libraries may pass, and explains errors in one line."""

import errno
import re
from typing import Any
from urllib.parse import urlsplit

from pipeline.storage.urls import safe_url

_FINAL_ERRNOS = frozenset(
    (
        *(errno.EINVAL, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
        *(errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.ELOOP, errno.EDQUOT),
    )
)
_FINAL_TYPES = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, MemoryError)
_NETWORK_MODULES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "requests", "urllib3", "gcsfs", "google", "azure")
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}
_FINAL_NAMES = {*_NO_CREDENTIALS, "ProfileNotFound", "ParamValidationError", "NoRegionError"}
_NO_CERTIFICATE = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")  # in messages of the TLS library

_DAMAGED_UPLOAD = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_UNKNOWN_KEY = {"InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId", "UnrecognizedClientException"}
_ELSEWHERE = {
    *("PermanentRedirect", "301", "302", "308"),
    *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
}
_CLOCK = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_DENIED = {"AccessDenied", "SignatureDoesNotMatch", "Forbidden", "401", "403", "407"}
STATUS_ONLY = {"301", "302", "308", "400", "401", "403"}
"""The codes of answers to HEAD, which have no body that would say why."""
_REFUSALS = {*_EXPIRED, *_UNKNOWN_KEY, *_ELSEWHERE, *_CLOCK, *_DENIED, *STATUS_ONLY}
_NEVER_PASSES = {
    *("InvalidObjectState", "InvalidPayer", "NotSignedUp", "AllAccessDisabled", "AccountProblem"),
    "CrossLocationLoggingProhibited",
}
_SIGN_IN_NAMES = {"RefreshError", "DefaultCredentialsError", "ClientAuthenticationError"}  # of Google and Azure


def is_storage_failure(error: BaseException) -> bool:
    """Return whether the error comes from the storage: it is an OSError or an error of a network library, or this
    process has reached a limit while it used one."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or module in _NETWORK_MODULES or _no_thread(error) or type(error) is MemoryError


def is_transient(error: BaseException) -> bool:
    """Return whether retrying the operation that raised this error can help.

    It cannot if the error does not come from the storage, or if it stays the same until somebody acts, for example if a
    file, rights, space or credentials are missing.
    """
    if code_of(error) in _DAMAGED_UPLOAD:
        return True
    if not is_storage_failure(error) or is_refusal(error) or type(error).__name__ in _FINAL_NAMES:
        return False
    if isinstance(error, _FINAL_TYPES) or (isinstance(error, OSError) and error.errno in _FINAL_ERRNOS):
        return False
    return not _is_untrusted(error) and _status_of(error) not in (400, 404, 405, 410)


def is_refusal(error: BaseException) -> bool:
    """Return whether a store answered that the caller may not do this.

    On a store that has allowed it before, this may pass: credentials are renewed, rights are set anew, a service that
    checks them is down. On a store that has not, it is more likely a wrong key, and stays.
    """
    if code_of(error) in _NEVER_PASSES:
        return False
    if code_of(error) in _REFUSALS or _status_of(error) in (401, 403, 407):
        return True
    if isinstance(error, OSError) and error.errno == errno.EREMCHG:
        return code_of(error) == ""
    named = type(error).__name__ in _NO_CREDENTIALS or type(error).__name__ in _SIGN_IN_NAMES
    return named or isinstance(error, PermissionError)


def needs_credentials(error: BaseException) -> bool:
    """Return whether the credentials of this process are not valid, so that it may help to look for new ones."""
    return code_of(error) in {*_EXPIRED, *_UNKNOWN_KEY} or type(error).__name__ in _NO_CREDENTIALS


def code_of(error: BaseException) -> str:
    """Return the store's own code for an error of S3, such as `AccessDenied`, or the HTTP status in digits if there was
    only that; "" for other errors."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict) and isinstance(answer.get("Error"), dict):
            return str(answer["Error"].get("Code", ""))
    return ""


def hidden_failure(error: BaseException) -> BaseException | None:
    """Return the failure of the network or the store that a library reports as a missing file; None if it is missing.

    fsspec does so for http and https, whatever the answer was and even if there was none.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or code_of(error):
        return None
    if isinstance(cause, FileNotFoundError):
        return hidden_failure(cause)
    return cause if is_storage_failure(cause) and _status_of(cause) not in (404, 410) else None


def cause(error: BaseException) -> str:
    """Return the text of an error of the storage in one line, without credentials, with what to do if that is known."""
    known = _by_code(error) or _by_type(error)
    if known:
        return known
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
    return " ".join(safe_url(word) if "://" in word else word for word in text.split()) or type(error).__name__


def _by_code(error: BaseException) -> str | None:
    code = code_of(error)
    if code in _EXPIRED:
        return f"the credentials have expired ({code}); renew them and submit again"
    if code in _UNKNOWN_KEY:
        return f"the store does not know the access key or token ({code}); check AWS_ACCESS_KEY_ID or AWS_PROFILE"
    if code in _CLOCK:
        return f"this machine's clock and the store's are too far apart ({code}); set the clock and submit again"
    if code in _ELSEWHERE or (isinstance(error, OSError) and error.errno == errno.EREMCHG):
        region = _region_of(error)
        return (
            f"the bucket is in another region or at another endpoint{region}; set AWS_DEFAULT_REGION, or "
            "AWS_ENDPOINT_URL, to that of the bucket"
        )
    if code == "InvalidObjectState":
        return "it is archived; restore it to a storage class that can be read"
    if code == "400":
        return "the store refused the request (400) and did not say why; check credentials, region and clock"
    return None


def _by_type(error: BaseException) -> str | None:
    name, number = type(error).__name__, error.errno if isinstance(error, OSError) else None
    if isinstance(error, PermissionError) or _status_of(error) in (401, 403):
        return "permission denied; check the rights of the user or of the credentials"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if number == errno.ENOSPC:
        return "no space left on device; free some: it is tried again, or the job continues when it is submitted again"
    if name in _NO_CREDENTIALS:
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if _is_untrusted(error):
        return (
            "the certificate of the endpoint is not trusted; check the endpoint, or set AWS_CA_BUNDLE to its authority"
        )
    if name == "EndpointConnectionError":
        endpoint = str(getattr(error, "kwargs", {}).get("endpoint_url", ""))
        return f"nothing answers at {_host_of(endpoint)}; does the store run, and is AWS_ENDPOINT_URL right?"
    if number == errno.ECONNREFUSED or name.startswith("ClientConnector"):
        host = f"{getattr(error, 'host', '')}:{getattr(error, 'port', '')}".strip(":")
        return f"nothing answers{f' at {host}' if host else ''}; does the store run, and is the address right?"
    if _no_thread(error) or number in (errno.EAGAIN, errno.ENOMEM) or type(error) is MemoryError:
        return (
            "this machine or container has reached its limit of processes, threads or memory; raise the limit (pids, "
            "memory), or stop what else runs there"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many files are open; raise the limit (ulimit -n)"
    return None


def _no_thread(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def _is_untrusted(error: BaseException) -> bool:
    text = str(error) if type(error).__name__ in ("SSLError", "ClientConnectorSSLError") else ""
    by_name = type(error).__name__ in ("SSLCertVerificationError", "ClientConnectorCertificateError")
    return by_name or any(mark in text for mark in _NO_CERTIFICATE)


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error of aiohttp, gcsfs or Azure; None for other errors."""
    for name in ("status", "status_code", "code"):
        found = getattr(error, name, None)
        if isinstance(found, int) and not isinstance(error, OSError):
            return found
    return None


def _region_of(error: BaseException) -> str:
    """Return ` (eu-west-1)` with the region or endpoint that the store named; "" if it named none."""
    for each in (error, error.__cause__):
        answer: Any = getattr(each, "response", None)
        if isinstance(answer, dict):
            details = answer.get("Error", {})
            headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            found = details.get("Region") or headers.get("x-amz-bucket-region") or details.get("Endpoint")
            if found and re.fullmatch(r"[\w.:/-]+", str(found)):
                return f" ({found})"
    return ""


def _host_of(url: str) -> str:
    """Return the scheme, host and port of a URL."""
    parts = urlsplit(safe_url(url))
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else "the endpoint"
