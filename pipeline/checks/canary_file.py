"""Reads and writes the canary.json of a checkpoint: the known completions for model.checks.canary, in a file beside the
weights.

The file is not part of the checkpoint's identity: a job can be resumed after it was added, replaced or removed.
"""

import json
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.checkpoint.reader import BUILTIN
from pipeline.core.errors import CheckpointError
from pipeline.storage.storage import split_url
from pipeline.storage.urls import safe_url

NAME = "canary.json"
FORMAT: Final = 1
"""The version of the file's format that this module reads and writes."""

Ids = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
"""Token ids: a list in JSON, a tuple here."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CanaryPrompt(_Record):
    """A prompt as text, and as the token ids that the checkpoint's tokenizer made of it."""

    text: str
    ids: Ids = Field(min_length=1)


class CanaryCase(_Record):
    """A model.checks.canary.Case as canary.json stores it. Instead of the prompt's token ids it has `prompt`, the
    position of the prompt in `CanaryFile.prompts`."""

    prompt: int = Field(ge=0)
    mode: Literal["ar", "diffusion"]
    token_ids: Ids = Field(min_length=1)
    stable: int = Field(ge=0)
    scores: Annotated[tuple[float, ...], Field(strict=False)]
    fed: Annotated[tuple[Annotated[tuple[Ids, ...], Field(strict=False)], ...], Field(strict=False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.scores) != len(self.token_ids) or self.stable > len(self.token_ids):
            raise ValueError("scores and stable do not fit token_ids")
        return self


class CanaryFile(_Record):
    """The content of canary.json: the prompts, the cases, and how they were made."""

    format: Literal[1] = FORMAT
    checkpoint: str
    """Checkpoint.identity() of the checkpoint that the file was made from."""
    dtype: Literal["float32", "bfloat16"]
    """The type in which the model computed the cases."""
    device: str
    """Name of the GPU that computed the cases, or `cpu`."""
    torch: str
    """Version of torch."""
    settings: dict[str, float | int]
    """The model.checks.canary.SETTINGS of that version."""
    rounding: dict[str, Annotated[float, Field(ge=0)]] | None
    """Result of model.checks.canary.measure_rounding, by mode; null if the file was not made in float32."""
    prompts: Annotated[tuple[CanaryPrompt, ...], Field(strict=False, min_length=1)]
    cases: Annotated[tuple[CanaryCase, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = self.settings.get("block_size")
        for case in self.cases:
            if self.rounding is not None and case.mode not in self.rounding:
                raise ValueError(f"rounding has no {case.mode}")
            if case.prompt >= len(self.prompts):
                raise ValueError(f"a case has prompt {case.prompt}, the last one is {len(self.prompts) - 1}")
            blocks = -(-len(case.token_ids) // int(size or 1)) if case.mode == "diffusion" else 0
            if len(case.fed) != blocks or any(len(fed) != size for steps in case.fed for fed in steps):
                raise ValueError("fed does not fit token_ids and block_size")
            if not all(case.fed):
                raise ValueError("a block was fed in no step")
        return self

    def largest_id(self) -> int:
        """Return the largest of all token ids in the file."""
        ids = [id_ for prompt in self.prompts for id_ in prompt.ids]
        for case in self.cases:
            ids += [*case.token_ids, *(id_ for steps in case.fed for fed in steps for id_ in fed)]
        return max(ids)

    def to_json(self) -> bytes:
        """Return the file as JSON, with a line for each field, each prompt and each case."""
        fields = self.model_dump(mode="json")
        lists = {name: fields.pop(name) for name in ("prompts", "cases")}
        lines = [f' "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in fields.items()]
        for name, items in lists.items():
            rows = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in items)
            lines.append(f' "{name}": [\n{rows}\n ]')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def canary_url(checkpoint: str) -> str:
    """Return the path or URL of a checkpoint's canary.json, which is beside its weights. `checkpoint` may also be
    `builtin:NAME`."""
    built_in = {f"builtin:{name}": str(folder) for name, folder in BUILTIN.items()}
    return f"{built_in.get(checkpoint, checkpoint).rstrip('/')}/{NAME}"


def remedy(checkpoint: str) -> str:
    """Return the advice that ends messages about a canary.json that cannot be used or does not fit."""
    return f"make it again (twotower canary {safe_url(checkpoint)} --force) or delete it"


def read_canary(checkpoint: str) -> CanaryFile | None:
    """Return the canary.json of a checkpoint, or None if it has none.

    Raises CheckpointError if the file is broken or has another FORMAT, and StorageError if the storage fails.
    """
    storage, name = split_url(canary_url(checkpoint))
    data = storage.read_if_exists(name)
    if data is None:
        return None
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refused(checkpoint, f"is not JSON: {error}") from None
    version = fields.get("format") if isinstance(fields, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise _refused(checkpoint, f"has format {version!r}, this version reads {FORMAT}")
    try:
        return CanaryFile.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _refused(checkpoint, f"cannot be read: {place + ': ' if place else ''}{first['msg']}") from None


def write_canary(url: str, canary: CanaryFile, *, force: bool) -> None:
    """Write the file as a whole; replace an existing one only with `force`.

    Raises CheckpointError if there is one and `force` is false, and StorageError if the storage fails.
    """
    storage, name = split_url(url)
    if force:
        storage.write(name, canary.to_json())
    elif not storage.create(name, canary.to_json()):
        raise CheckpointError(f"{safe_url(url)} exists already: --force replaces it")


def require_free(url: str) -> None:
    """Raise CheckpointError if the file exists already. This is called before the work that makes its content, which
    may take minutes."""
    storage, name = split_url(url)
    if storage.exists(name):
        raise CheckpointError(f"{safe_url(url)} exists already: --force replaces it")


def _refused(checkpoint: str, why: str) -> CheckpointError:
    return CheckpointError(f"{safe_url(canary_url(checkpoint))} {why}; {remedy(checkpoint)}")
