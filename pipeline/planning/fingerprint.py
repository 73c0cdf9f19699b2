"""Makes the fingerprint of a job, which covers every setting that changes the output, and compares input listings.

Two jobs are the same if they have the same fingerprint and the same listing. The listing is not part of the
fingerprint: an output may grow with its input (`input.on_change: extend`), and no row of it depends on which other
files there are.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.job import GenerationSection, Job
from pipeline.core.schema import RESULT_COLUMNS, SCHEMA_VERSION, plain_type
from pipeline.core.text import shorten
from pipeline.planning.part_size import ESTIMATE

FIRST_SETTINGS = frozenset(
    {
        *("mode", "max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "temperature"),
        *("top_k", "top_p", "seed", "eos_ids", "stop", "on_degenerate"),
    }
)
"""The settings of `generation` that are in every fingerprint. A setting that was added later is left out while it has
its default, so that outputs from before it existed keep their fingerprint."""
NAMED_AT_MOST = 3
"""The most files that the text of a ListingChange names."""
Listing = Mapping[str, tuple[int, str, int]]
"""The input files: name relative to the input root -> (size in bytes, stamp, number of rows)."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything in a job but its input files that determines its output, by name, and one digest over all of it."""

    fields: dict[str, Any]
    """The JSON values by name. The name of a setting is its dotted key in the job file."""
    digest: str
    """The SHA-256 (hex) of the fields as JSON with sorted keys (see digest_of)."""


def make_fingerprint(job: Job, schema: pa.Schema, checkpoint_identity: str) -> Fingerprint:
    """Return the fingerprint of a job.

    `schema`: that of its parts. `checkpoint_identity`: the hash of the checkpoint's content (Checkpoint.identity).
    Settings of replicas, GPUs, flushes, retries and the engine are left out: they change the speed of the job, but not
    its output.
    """
    # Converted to JSON and back, so that the fields equal those read from plan.json (tuples become lists).
    fields: dict[str, Any] = json.loads(
        json.dumps(
            {
                "input.prompt_column": job.input.prompt_column,
                "input.template": job.input.template,
                "input.id_column": job.input.id_column,
                "input.carry": job.input.carry,
                "input.row_settings": job.input.row_settings.columns,
                "output.rows_per_file": job.output.rows_per_file,
                **_part_size(job),
                "output columns": column_types(schema),
                "model.checkpoint": checkpoint_identity,
                "model.dtype": job.model.dtype,
                **_generation(job.generation),
                "output schema version": SCHEMA_VERSION,
            }
        )
    )
    return Fingerprint(fields, digest_of(fields))


def _generation(section: GenerationSection) -> dict[str, Any]:
    """Return the fields for the section `generation`."""
    fields = type(section).model_fields
    return {
        f"generation.{name}": value
        for name, value in section.model_dump().items()
        if name in FIRST_SETTINGS or value != fields[name].default
    }


def _part_size(job: Job) -> dict[str, Any]:
    """Return the fields for a part size in MB. There are none if output.target_mb is null, so that outputs from before
    this setting existed keep their fingerprint."""
    if job.output.target_mb is None:
        return {}
    return {"output.target_mb": job.output.target_mb, "estimate of part sizes": ESTIMATE}


def column_types(schema: pa.Schema) -> dict[str, str]:
    """Return the types of the id and the carried columns in a part's schema: name -> type as text.

    They are plain types, so a planned schema and that of the stored part give the same. The types of all other columns
    follow from SCHEMA_VERSION.
    """
    return {field.name: str(plain_type(field.type)) for field in schema if field.name not in RESULT_COLUMNS}


def digest_of(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value. The order of keys in its objects makes no difference."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a text `name: old -> new` for each field whose values differ; long values are cut off.

    A field that is missing on one side counts as null.
    """
    return [
        f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


@dataclass(frozen=True, slots=True)
class ListingChange:
    """The differences between the input files now and those in the plan of an output folder. Names are sorted."""

    added: tuple[str, ...]
    """Files that are not in the plan."""
    removed: tuple[str, ...]
    """Planned files that are gone."""
    rewritten: tuple[str, ...]
    """Planned files whose size, stamp or number of rows has changed."""

    @property
    def any(self) -> bool:
        """Return whether there is any difference."""
        return bool(self.added or self.removed or self.rewritten)

    @property
    def only_added(self) -> bool:
        """Return whether there are added files and all planned files are unchanged."""
        return bool(self.added) and not self.removed and not self.rewritten

    def __str__(self) -> str:
        """Return a text such as `a.parquet has changed, b.parquet is gone, c.parquet is new and 4 more`; at most
        NAMED_AT_MOST files are named."""
        said = [
            *(f"{name} has changed" for name in self.rewritten),
            *(f"{name} is gone" for name in self.removed),
            *(f"{name} is new" for name in self.added),
        ]
        more = f" and {len(said) - NAMED_AT_MOST} more" if len(said) > NAMED_AT_MOST else ""
        return ", ".join(said[:NAMED_AT_MOST]) + more


def listing_change(old: Listing, new: Listing) -> ListingChange:
    """Return the change from `old`, the listing in a plan, to `new`, the listing now."""
    return ListingChange(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        rewritten=tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    )


def _shown(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), 60)
