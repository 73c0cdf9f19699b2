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

from pipeline.config.job import GenerationSection, InputSection, Job
from pipeline.core.schema import PROMPT_COLUMN, RESULT_COLUMNS, SCHEMA_VERSION, plain_type
from pipeline.core.text import shorten
from pipeline.core.types import UNIT_RULES
from pipeline.planning.part_size import ESTIMATE
from pipeline.prompts.setup import PromptSetup

FIRST_SETTINGS = frozenset(
    {
        *("mode", "max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "temperature"),
        *("top_k", "top_p", "seed", "eos_ids", "stop", "on_degenerate"),
    }
)
"""The settings of `generation` that are in every fingerprint. A setting that was added later is left out while it has
its default, so that outputs from before it existed keep their fingerprint."""
COLUMNS = "output columns"
"""The field for the columns of the parts that come from the input, as column_types returns them."""
WORK_UNITS = "work units"
"""The field for the version of the rules by which units are cut (UNIT_RULES). An output without it has version 1."""
PROMPT_RULES = "prompts"
"""The field for the version of the rules by which prompts are made. An output without it has version 1."""
SHOWN_CHARS, SHOWN_BEFORE = 60, 20
"""The most characters of a value that a text about differences shows, and how many of them stand before the first
difference."""
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


def make_fingerprint(
    job: Job, schema: pa.Schema, checkpoint_identity: str, prompts: PromptSetup, unit_rules: int = UNIT_RULES
) -> Fingerprint:
    """Return the fingerprint of a job.

    `schema`: that of its parts. `checkpoint_identity`: the hash of the checkpoint's content (Checkpoint.identity).
    `prompts`: how its prompts are made. `unit_rules`: the version of the rules by which its units are cut.
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
                **_prompts(job.input, prompts),
                "output.rows_per_file": job.output.rows_per_file,
                **_part_size(job),
                **({WORK_UNITS: unit_rules} if unit_rules > 1 else {}),
                COLUMNS: column_types(schema),
                "model.checkpoint": checkpoint_identity,
                "model.dtype": job.model.dtype,
                **_generation(job.generation),
                "output schema version": SCHEMA_VERSION,
            }
        )
    )
    return Fingerprint(fields, digest_of(fields))


def _prompts(section: InputSection, setup: PromptSetup) -> dict[str, Any]:
    """Return the fields for how prompts are made that outputs from before version 2 of its rules did not have."""
    defaults = type(section).model_fields
    names = ("messages_column", "system", "nulls", "special_tokens")
    fields = {
        f"input.{name}": getattr(section, name) for name in names if getattr(section, name) != defaults[name].default
    }
    if setup.rules > 1:
        fields[PROMPT_RULES] = setup.rules
    if setup.chat is not None:
        fields |= {"chat template": setup.chat.template, "chat template's tokens": setup.chat.tokens}
    return fields


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
    """Return the types of the columns in a part's schema that come from the input, name -> type as text: the id, the
    carried columns and, only if the prompts are kept, the column of the prompts.

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

    A field that is missing on one side has the default of its setting there.
    """
    old, new = _with_keep_prompt(old), _with_keep_prompt(new)
    found = []
    for name in dict.fromkeys([*old, *new]):
        one, other = (fields.get(name, _default(name, fields)) for fields in (old, new))
        if one != other:
            found.append(f"{name}: {' -> '.join(_shown_both(one, other))}")
    return found


def _with_keep_prompt(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields with output.keep_prompt in place of the column that it adds: a long list of columns is cut off
    before that one."""
    columns = fields.get(COLUMNS)
    if not isinstance(columns, Mapping) or PROMPT_COLUMN not in columns:
        return fields
    if PROMPT_COLUMN in (fields.get("input.carry") or ()):
        return fields
    others = {name: kind for name, kind in columns.items() if name != PROMPT_COLUMN}
    return {**fields, COLUMNS: others, "output.keep_prompt": True}


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


def _default(name: str, fields: Mapping[str, Any]) -> Any:
    """Return the value of a setting of the input that is in a fingerprint only if it is not the default; None for all
    other fields."""
    if name == "input.special_tokens" and PROMPT_RULES not in fields:
        return "all"  # what version 1 of the rules did
    field = InputSection.model_fields.get(name.removeprefix("input."))
    return field.default if field is not None and name.removeprefix("input.") in ("nulls", "special_tokens") else None


def _shown_both(one: Any, other: Any) -> tuple[str, str]:
    """Return two different values as JSON, of long ones only the part from shortly before the first difference on."""
    texts = json.dumps(one, ensure_ascii=False), json.dumps(other, ensure_ascii=False)
    same = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    cut = max(0, same - SHOWN_BEFORE) if max(map(len, texts)) > SHOWN_CHARS else 0
    return shorten(f"{'…' * (cut > 0)}{texts[0][cut:]}", SHOWN_CHARS), shorten(
        f"{'…' * (cut > 0)}{texts[1][cut:]}", SHOWN_CHARS
    )
