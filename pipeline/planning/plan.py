"""Makes the plan of a job: its files, its work units and its fingerprint. It reads listings and footers, never data."""

from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.config.job import Job
from pipeline.core.errors import InputError
from pipeline.core.text import counted
from pipeline.core.types import WorkUnit
from pipeline.input.files import list_input, would_read
from pipeline.planning.columns import check_columns
from pipeline.planning.cost import prompt_columns
from pipeline.planning.fingerprint import Fingerprint, Listing, make_fingerprint
from pipeline.planning.footers import name_unreadable, read_footers
from pipeline.planning.packing import StoredUnits, make_units
from pipeline.planning.part_size import measured_columns
from pipeline.planning.prompts import Begun, ModelTexts, make_setup
from pipeline.prompts.setup import PromptSetup
from pipeline.storage.urls import safe_url

MAX_UNITS = 1_000_000
"""The most units of a job, because the driver holds them all in memory."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file as it was when the plan was made."""

    name: str
    """The path relative to the input root."""
    url: str
    """The path or URL that opens the file."""
    size: int
    """The size in bytes."""
    stamp: str
    """The FileInfo.stamp, which changes when the content does."""
    rows: int
    """The number of rows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a job: its input files, cut into work units, and the fingerprint that identifies it at a resume."""

    files: tuple[InputFile, ...]
    """The readable input files."""
    units: tuple[WorkUnit, ...]
    """All units of these files: first those that plan.json holds already, then those of new files, in the order of the
    files and rows."""
    rows: int
    """The number of rows in all files."""
    fingerprint: Fingerprint
    schema: pa.Schema
    """The schema of every part."""
    prompts: PromptSetup
    """How the prompts are made."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(name, reason) of input files that cannot be read; empty unless make_plan was called with allow_unreadable."""

    @property
    def listing(self) -> Listing:
        """Return the files in the form in which they are compared with those in plan.json."""
        return {file.name: (file.size, file.stamp, file.rows) for file in self.files}


def make_plan(
    job: Job,
    *,
    checkpoint_identity: str,
    texts: ModelTexts | None = None,
    begun: Begun | None = None,
    stored: StoredUnits | None = None,
    allow_unreadable: bool = False,
) -> Plan:
    """Return the plan of a job: list its input, read all footers in parallel, and cut and pack the files into units.

    `checkpoint_identity`: the hash of the checkpoint's content, for the fingerprint. `texts`: those of the checkpoint
    that prompts need (read_model_texts); None if no prompts will be made. `begun`: the facts about prompts that the
    output was begun with, and `stored` its units; None for a new output. With `allow_unreadable`, files that cannot be
    read are left out if others can be read. Raises InputError (one line that names the file or column) if there are no
    rows or too many units, if the output lies in the input, or if a file or column cannot be used; raises StorageError
    if the listing fails.
    """
    root, listing = list_input(job.input.path)
    shown = safe_url(job.input.path)
    if would_read(job.input.path, root, job.output.path):
        raise InputError(
            f"output {safe_url(job.output.path)} lies inside input {shown}: its parts would become input; "
            "give the output a folder of its own"
        )
    footers, unreadable = read_footers(root, listing, measured_columns(job), prompt_columns(job.input))
    if unreadable and (not allow_unreadable or not footers):
        raise InputError(name_unreadable(shown, len(listing), unreadable))
    stored = stored or StoredUnits()
    texts, begun = texts or ModelTexts(), begun or Begun()
    prompts = make_setup(job.input, footers, texts, begun)
    schema = check_columns(job.input, prompts, footers, keep_prompt=job.output.keep_prompt)
    files = [InputFile(info.name, info.path, info.size, info.stamp, sum(footer.groups)) for info, footer in footers]
    if (rows := sum(file.rows for file in files)) == 0:
        raise InputError(f"input {shown} has no rows: {counted(len(files), 'file')} without a row")
    fingerprint = make_fingerprint(job, schema, checkpoint_identity, prompts, stored.rules)
    if begun.maybe_old and stored.fingerprint != fingerprint.digest:
        old = make_setup(job.input, footers, texts, replace(begun, rules=1))
        if (
            older := make_fingerprint(job, schema, checkpoint_identity, old, stored.rules)
        ).digest == stored.fingerprint:
            prompts, fingerprint = old, older
    if stored.fingerprint != fingerprint.digest:
        stored = StoredUnits(stored.rules)
    units: list[WorkUnit] = []
    for unit in make_units(job, footers, stored):
        units.append(unit)
        if len(units) > MAX_UNITS:
            setting = "rows_per_file" if job.output.target_mb is None else "target_mb"
            raise InputError(f"input {shown} makes more than {MAX_UNITS} units: raise output.{setting}")
    return Plan(tuple(files), tuple(units), rows, fingerprint, schema, prompts, tuple(unreadable))
