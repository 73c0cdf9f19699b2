"""Defines the checks of `doctor` for a machine that need neither torch nor Ray. The checks that need them are in
workers.checks and workers.cluster.checks."""

import functools
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.checks.findings import Check, Finding, fail, ok, warn
from pipeline.config.job import Job
from pipeline.storage.urls import safe_url

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
"""The project's folder, which is the working directory that Ray uploads."""
GIB = 1 << 30
LITTLE_DISK = 2 * GIB
"""Bytes of free space for temporary files below which the check warns."""
UPLOAD_LIMIT = 100 << 20
"""Largest working directory in bytes that Ray's job server accepts."""
CLOCK_S = 60.0
"""Seconds by which the clock may be off. S3 refuses requests from 900 seconds on."""
HTTP_S = 10.0
"""Time limit in seconds for an answer of a web server or of git."""
S3_ENDPOINT = "https://s3.amazonaws.com"
NEW_TOKEN = "make one with `ray get-auth-token --generate` and give all nodes and clients the same"
"""The fix for a token of Ray that is missing."""


def machine_checks(job: Job | None) -> list[Check]:
    """Return the checks of the machine. If the job uses S3, they also warn if there are no credentials, and compare the
    clock with that of an S3 server. `job` is None if `doctor` runs without a job."""
    urls = [job.input.path, job.output.path, job.model.checkpoint] if job else []
    s3 = any(url.startswith(("s3://", "s3a://")) for url in urls)
    return [
        Check("python", check_python),
        Check("scratch", check_scratch),
        Check("upload", check_upload),
        Check("clock", functools.partial(check_clock, s3_endpoint() if s3 else None)),
        Check("credentials", functools.partial(check_credentials, needed=s3)),
        Check("ray auth", lambda: [check_authentication(os.environ, token_source(os.environ))]),
    ]


def check_python() -> Iterator[Finding]:
    """Compare the installed versions of Python and of the packages with pyproject.toml. No package is imported."""
    from pipeline.storage.storage import read_text

    project = tomllib.loads(read_text(os.path.join(ROOT, "pyproject.toml")))["project"]
    wanted, versions = project["dependencies"], {"Python": platform.python_version()}
    faults = [] if versions["Python"] in SpecifierSet(project["requires-python"]) else [f"Python {versions['Python']}"]
    for requirement in map(Requirement, wanted):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        versions[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    if faults:
        yield fail(
            f"not as pyproject.toml asks: {', '.join(faults)}",
            "`pip install -c constraints.txt -e .` in the project's folder",
        )
    else:
        named = ", ".join(f"{name} {versions[name]}" for name in ("Python", "ray", "torch", "pyarrow"))
        yield ok(f"{named} and {len(wanted) - 3} more packages are as pyproject.toml asks")


def check_scratch() -> Iterator[Finding]:
    """Report the free space for temporary files, and warn if it is less than LITTLE_DISK."""
    folder = tempfile.gettempdir()  # raises FileNotFoundError if no folder can be written to
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    yield ok(found) if free >= LITTLE_DISK else warn(found, "free some, or set TMPDIR to a folder with more room")


def check_upload() -> Iterator[Finding]:
    """Add up the files that `ray job submit --working-dir .` would upload, and warn if they exceed UPLOAD_LIMIT.

    Like git, Ray leaves out ignored files.
    """
    names = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(names, capture_output=True, timeout=HTTP_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        yield ok("not measured: this folder is not a git repository, as in the copy that Ray makes")
        return
    size = 0
    for name in filter(None, listed.split(b"\0")):
        with suppress(OSError):  # the file was deleted, but is still in git's index
            size += os.lstat(os.path.join(os.fsencode(ROOT), name)).st_size
    found = f"{size / (1 << 20):.1f} MiB for `ray job submit --working-dir .`"
    fix = f"Ray takes {UPLOAD_LIMIT >> 20} MiB packed: name large files in .rayignore"
    yield ok(found) if size <= UPLOAD_LIMIT else warn(found, fix)


def check_clock(server: str | None) -> Iterator[Finding]:
    """Compare the clock with that of the web server at the URL `server`. If `server` is None, only check that the clock
    is not earlier than the time of this program's files."""
    now = time.time()
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    fix = "set the clock, for instance with chrony or ntpd; S3 refuses requests that are 15 minutes off"
    if server is None:
        behind = os.path.getmtime(__file__) - now
        yield ok(found) if behind < CLOCK_S else warn(f"{found}, earlier than this program's files", fix)
        return
    stamp = answer(server)[1].get("Date")
    if stamp is None:
        yield warn(f"{found}; {safe_url(server)} sends no time to compare with", "compare it yourself")
        return
    off = abs(parsedate_to_datetime(stamp).timestamp() - time.time())
    found = f"{found}, {off:.0f} s from {safe_url(server)}"
    yield ok(found) if off <= CLOCK_S else warn(found, fix)


def check_credentials(needed: bool) -> Iterator[Finding]:
    """Report whether there are credentials for S3 and where they come from, but never their values. Warn if there are
    none although they are `needed`."""
    import botocore.session

    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is not None:
        yield ok(f"S3: found by {credentials.method}; region {session.get_config_variable('region') or 'not set'}")
    elif needed:
        yield warn("S3: none found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give a role")
    else:
        yield ok("S3: none, and only s3:// paths need them")


def check_authentication(environ: Mapping[str, str], token: str | None) -> Finding:
    """Report how this process would authenticate to a Ray cluster. `environ`: the environment variables. `token`: the
    result of token_source."""
    mode, cluster = environ.get("RAY_AUTH_MODE"), bool(environ.get("RAY_ADDRESS"))
    has = f"the token of {token}" if token else "no token"
    if mode not in (None, "token", "disabled"):
        return fail(f"RAY_AUTH_MODE is {mode!r}", "set it to token or to disabled")
    if mode == "token" and token is None and cluster:
        return fail("RAY_AUTH_MODE is token, but there is no token", NEW_TOKEN)
    if mode == "token":
        return ok(f"mode token, {has}" if token else "mode token; Ray on this machine makes one")
    if mode == "disabled" and cluster:
        return warn(
            "mode disabled: whoever reaches the cluster can run code on it",
            f"set RAY_AUTH_MODE=token on all nodes and here; {NEW_TOKEN}",
        )
    if mode is None and cluster:
        return warn(
            f"RAY_AUTH_MODE is not set, {has}: servers of Ray 2.60 ask for a token, clients then send none",
            f"set RAY_AUTH_MODE=token here as on the cluster; {NEW_TOKEN}",
        )
    return ok(f"mode {mode or 'not set'}, {has}; it matters for clusters only")


def token_source(environ: Mapping[str, str]) -> str | None:
    """Return the place from which Ray would take its token, as text for messages, or None if no token is there."""
    if environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if path := environ.get("RAY_AUTH_TOKEN_PATH"):
        return "RAY_AUTH_TOKEN_PATH" if os.path.isfile(path) else None
    default = os.path.expanduser("~/.ray/auth_token")
    return "~/.ray/auth_token" if os.path.isfile(default) else None


def s3_endpoint() -> str:
    """Return the URL of the S3 server that jobs would use; it can be asked for the time."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or S3_ENDPOINT


def answer(url: str, token: str | None = None) -> tuple[int, Message, bytes]:
    """Send a GET request, with `token` as its bearer token if given, and return (status, headers, body).

    An error status is returned, too, with an empty body. Raises OSError if there is no answer within HTTP_S.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=HTTP_S) as response:
            return response.status, response.headers, response.read(1 << 20)
    except urllib.error.HTTPError as error:  # an error status is an answer, too
        with error:
            return error.code, error.headers, b""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
