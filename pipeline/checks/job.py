"""Defines the checks of `doctor` for a job: of its file, its input, its output and its checkpoint."""

import functools
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pipeline.checks.findings import Check, Finding, fail, ok, warn
from pipeline.config.job import Job
from pipeline.core.errors import StorageError, TwoTowerError
from pipeline.core.text import counted
from pipeline.storage.urls import is_local, safe_url

GIB = 1 << 30


def open_job(path: str | None, overrides: Sequence[str]) -> tuple[Job | None, list[Check]]:
    """Return the job in the file `path`, and a list with the check that says whether its settings are valid.

    The job is None if they are not. If `path` is None, the result is (None, []). `overrides`: `KEY=VALUE` texts.
    """
    if path is None:
        return None, []
    from pipeline.config.loader import load_job

    try:
        job = load_job(path, overrides)
    except TwoTowerError as error:
        refused = [fail(str(error))]
        return None, [Check("job", lambda: refused)]
    return job, [Check("job", lambda: [ok(f"{job.name}, its settings are valid")])]


def job_checks(job: Job) -> list[Check]:
    """Return the checks of a job's input, output and checkpoint."""
    return [
        Check("input", functools.partial(check_input, job), seconds=120),
        Check("output", functools.partial(check_output, job.output.path), seconds=120),
        Check(
            "checkpoint",
            functools.partial(check_checkpoint, job),
            seconds=120,
            advice="check model.checkpoint, its files, and the credentials that read them",
        ),
    ]


def check_input(job: Job) -> Iterator[Finding]:
    """List the input, read the footer of its first file, and fail if a column that the job needs is missing there."""
    import pyarrow.parquet as pq

    from pipeline.input.files import list_input
    from pipeline.planning.prompts import prompt_columns_in
    from pipeline.storage.storage import Storage

    shown = safe_url(job.input.path)
    root, files = list_input(job.input.path)
    first = files[0]
    with Storage(root).open(first.name, first.size) as source:
        footer = pq.ParquetFile(source)
        names, rows = set(footer.schema_arrow.names), footer.metadata.num_rows
    try:
        prompts = prompt_columns_in(job.input, sorted(names))
    except ValueError as error:
        yield fail(f"{shown}: {first.name}: {error}", "fix the template in the job file")
        return
    if missing := [column for column in job.input.columns_with(prompts) if column not in names]:
        has = ", ".join(sorted(names)[:10])
        yield fail(f"{shown}: {first.name} has no column {', '.join(missing)}", f"it has {has}: fix the job file")
        return
    size = sum(file.size for file in files)
    yield ok(f"{shown}: {size / GIB:.2f} GiB in {counted(len(files), 'file')}; {first.name} has {counted(rows, 'row')}")


def check_output(url: str) -> Iterator[Finding]:
    """Create a file in the output folder, try to create it again (which must fail), read it and delete it.

    Folders that this made are removed again. Publishing each part once depends on the failure.
    """
    from pipeline.output.layout import PLAN
    from pipeline.storage.storage import Storage, real_path

    storage, shown, name = Storage(url), safe_url(url), f"_doctor-{uuid.uuid4().hex}"
    if (kind := storage.kind()) not in (None, "folder"):
        yield fail(f"{shown} is a {kind}", "give output.path a folder of the job's own")
        return
    made = _missing_folders(real_path(url)) if is_local(url) else []
    try:
        first, second = storage.create(name, b"first"), storage.create(name, b"second")
        kept = storage.read(name)
    finally:
        left = ""
        try:
            storage.remove(name)
        except StorageError as error:
            left = str(error)
    with suppress(OSError):  # another process may have put a file there
        for folder in made:
            os.rmdir(folder)
    if second or kept != b"first":
        yield fail(
            f"{shown} lets a second writer replace a file that was to be created once",
            "use a store with conditional writes (If-None-Match): without them, rows may be published twice",
        )
    elif not first:
        yield warn(f"{shown} took the probe file, but only the second time", "run doctor again")
    elif left:
        yield warn(f"{shown} can be written to, not deleted from: {left}", "allow it, or finished segments stay")
    else:
        held = "already holds a job's output" if storage.exists(PLAN) else "holds no job's output yet"
        yield ok(f"{shown} can be written to, refuses to create a file twice, and {held}")


def _missing_folders(path: str) -> list[str]:
    """Return the folders on an absolute path, itself included, that do not exist yet; the innermost one is first."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def check_checkpoint(job: Job) -> Iterator[Finding]:
    """Open the checkpoint and check its config, its tokenizer, that it has all tensors that the job's mode needs in the
    right shapes, and that the job's limits fit its context. No weights are read.

    Warn if there is no canary.json, unless the checkpoint is built in.
    """
    from pipeline.checks.canary_file import read_canary
    from pipeline.planning import checkpoint

    shown = safe_url(job.model.checkpoint)
    opened = checkpoint.check_checkpoint(job)
    size = sum(tensor.nbytes for tensor in opened.tensors.values())
    yield ok(f"{shown}: {len(opened.tensors):,} tensors of {size / GIB:.2f} GiB, complete for {job.generation.mode}")
    if read_canary(job.model.checkpoint) is None and not job.model.checkpoint.startswith("builtin:"):
        yield warn(
            f"{shown} has no canary.json: replicas cannot compare their completions with known ones",
            f"run `twotower canary {shown}` on a machine that is known to generate the right completions",
        )
