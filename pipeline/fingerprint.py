"""The fingerprint of a job: everything that changes its output, and nothing that does not."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.job import Job
from pipeline.schema import SCHEMA_VERSION

LISTING_FIELD = "input.files"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Named settings and one digest over all of them."""

    fields: dict[str, Any]
    """JSON values by dotted job key, with `input.files` for the listing."""
    digest: str
    """sha256 of the fields as canonical JSON."""


def make_fingerprint(job: Job, files: Sequence[Sequence[Any]], checkpoint_identity: str) -> Fingerprint:
    """The fingerprint of a job over its listing: (name, size, stamp, rows) of each file, in order.

    Replicas, GPUs and engine limits are left out: they change how fast the output comes, never what it is.
    """
    # Through JSON, so that the fields compare equal to those read back from plan.json (tuples become lists).
    fields: dict[str, Any] = json.loads(
        json.dumps(
            {
                LISTING_FIELD: {"count": len(files), "digest": digest_of(files)},
                "input.prompt_column": job.input.prompt_column,
                "input.template": job.input.template,
                "input.id_column": job.input.id_column,
                "input.carry": job.input.carry,
                "output.rows_per_file": job.output.rows_per_file,
                "model.checkpoint": checkpoint_identity,
                "model.dtype": job.model.dtype,
                **{f"generation.{key}": value for key, value in job.generation.model_dump().items()},
                "output schema version": SCHEMA_VERSION,
            }
        )
    )
    return Fingerprint(fields, digest_of(fields))


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One `name: old -> new` for each field that differs, the listing left out: its files are named by the caller."""
    return [
        f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if name != LISTING_FIELD and old.get(name) != new.get(name)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
