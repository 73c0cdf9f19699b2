"""What makes two jobs the same: a fingerprint of everything in the settings that changes the output, and the listing.

The listing is not part of the fingerprint: an output may grow with its input (`input.on_change: extend`), and no row of
it depends on which other files there are.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.job import Job
from pipeline.core.schema import RESULT_COLUMNS, SCHEMA_VERSION, plain_type
from pipeline.planning.part_size import ESTIMATE

NAMED_AT_MOST = 3
Listing = Mapping[str, tuple[int, str, int]]
"""Input files: (size in bytes, stamp, rows) by name."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Named settings and one digest over all of them."""

    fields: dict[str, Any]
    """JSON values by dotted job key."""
    digest: str
    """sha256 of the fields as canonical JSON."""


def make_fingerprint(job: Job, schema: pa.Schema, checkpoint_identity: str) -> Fingerprint:
    """The fingerprint of a job whose parts have this schema.

    Replicas, GPUs and engine limits are left out: they change how fast the output comes, never what it is.
    """
    # Through JSON, so that the fields compare equal to those read back from plan.json (tuples become lists).
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
                **{f"generation.{key}": value for key, value in job.generation.model_dump().items()},
                "output schema version": SCHEMA_VERSION,
            }
        )
    )
    return Fingerprint(fields, digest_of(fields))


def _part_size(job: Job) -> dict[str, Any]:
    """Nothing where units are cut by rows: jobs from before there was a choice have the fingerprint that they had."""
    if job.output.target_mb is None:
        return {}
    return {"output.target_mb": job.output.target_mb, "estimate of part sizes": ESTIMATE}


def column_types(schema: pa.Schema) -> dict[str, str]:
    """The types of the id and the carried columns of a part, by name: the same for a planned schema and a stored one.

    The other columns are those of `output schema version`.
    """
    return {field.name: str(plain_type(field.type)) for field in schema if field.name not in RESULT_COLUMNS}


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One `name: old -> new` for each field that differs."""
    return [
        f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


@dataclass(frozen=True, slots=True)
class ListingChange:
    """How the input differs from the listing that an output was planned over; names in order."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    rewritten: tuple[str, ...]
    """Of another size, stamp or number of rows."""

    @property
    def any(self) -> bool:
        """Whether there is a difference at all."""
        return bool(self.added or self.removed or self.rewritten)

    @property
    def only_added(self) -> bool:
        """Whether all that was planned is still as it was, and there is more."""
        return bool(self.added) and not self.removed and not self.rewritten

    def __str__(self) -> str:
        """`a.parquet has changed, b.parquet is gone and 4 more`."""
        said = [
            *(f"{name} has changed" for name in self.rewritten),
            *(f"{name} is gone" for name in self.removed),
            *(f"{name} is new" for name in self.added),
        ]
        more = f" and {len(said) - NAMED_AT_MOST} more" if len(said) > NAMED_AT_MOST else ""
        return ", ".join(said[:NAMED_AT_MOST]) + more


def listing_change(old: Listing, new: Listing) -> ListingChange:
    """What happened to the input between two listings."""
    return ListingChange(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        rewritten=tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
