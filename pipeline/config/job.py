"""The job: what a job file may say. Every field is explained where it stands; unknown keys and wrong types are refused.

Range rules of generation settings and engine limits live in `model.requests` alone; the sections here build those
objects to be checked, and pass their messages on.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr, model_validator

from model.checkpoint.config import Towers
from model.requests import EngineLimits, GenerationParams, Mode
from pipeline.prompts.template import template_columns

Text = Annotated[StrictStr, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]  # YAML knows lists alone: take them for tuples
Ids = Annotated[tuple[StrictInt, ...], Field(strict=False)]

OLD_KEYS: Mapping[str, str] = {"checkpoint": "flush"}
"""Keys at the top level of a job that had another name once, which goes on working: old name -> today's."""


def rename_old_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the settings of a job under today's keys. Raises ValueError if one of them stands under both its names."""
    for old, new in OLD_KEYS.items():
        if old in settings and new in settings:
            raise ValueError(f"{old} and {new} are both given: keep one of them; {old} is the old name of {new}")
    return {OLD_KEYS.get(key, key): value for key, value in settings.items()}


def _check_replicas(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("it must be a whole number of at least 1, or auto")


def _check_max_rows(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError("it must be a whole number, without quotes, or auto")


class Section(BaseModel):
    """What all parts of a job share: frozen, no unknown keys, no guessing of types ("16" is not a number)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RowSettingsSection(Section):
    """Columns that give each row generation settings of its own, by setting. A null cell is the job's value; a value
    that cannot be makes its row an error row."""

    max_new_tokens: Text | None = None
    """A column of integers."""
    temperature: Text | None = None
    """A column of numbers."""
    confidence_threshold: Text | None = None
    """A column of numbers."""
    seed: Text | None = None
    """A column of integers."""
    stop: Text | None = None
    """A column of strings or of lists of strings; they replace those of generation.stop, an empty list by none."""

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> column, of those in use."""
        return self.model_dump(exclude_none=True)


class InputSection(Section):
    """Where the prompts come from."""

    path: Text
    """A Parquet file, a folder (all *.parquet below it) or a glob; local or any fsspec URL such as s3://bucket/prompts/.
    Local links to files and folders are followed."""
    prompt_column: Text | None = None
    """The column that holds the prompt, of a string type. "prompt" where no template is given either."""
    template: Text | None = None
    """A jinja2 template over the columns of a row, instead of prompt_column: "Summarise: {{ title }}\\n{{ body }}"."""
    id_column: Text | None = None
    """The column that becomes `id` in the output, of an integer or string type; null: ids are `<file>#<row>`."""
    carry: Names = ()
    """Columns copied to the output as they are."""
    row_settings: RowSettingsSection = RowSettingsSection()
    """Generation settings that stand in columns of the input."""
    on_change: Literal["error", "extend"] = "error"
    """What to do where the input is not that of the output folder's plan. error: refuse, naming the files. extend: take
    files that were added, and refuse where others were removed or rewritten; for scheduled jobs."""

    @property
    def columns(self) -> list[str]:
        """All that is read of a row, each once: what the prompt is made of, the id, what is carried, its settings."""
        prompt = template_columns(self.template) if self.template is not None else (self.prompt_column,)
        names = [*prompt, self.id_column, *self.carry, *self.row_settings.columns.values()]
        return [name for name in dict.fromkeys(names) if name is not None]

    @model_validator(mode="before")
    @classmethod
    def _default_prompt(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("prompt_column") is None and data.get("template") is None:
            return {**data, "prompt_column": "prompt"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt_column is not None and self.template is not None:
            raise ValueError("prompt_column and template are both given: keep one of them")
        if self.template is not None:
            template_columns(self.template)
        return self


class OutputSection(Section):
    """Where the completions go."""

    path: Text
    """A folder of this job's own; local or any fsspec URL. Submitting the job again resumes what is there."""
    rows_per_file: int | None = Field(default=None, ge=1)
    """Rows in one output file at most: the unit of work, of retry and of resume. 10,000 where target_mb is not given
    either."""
    target_mb: float | None = Field(default=None, gt=0, le=2000)
    """Instead of rows_per_file: about how large an output file is to be, in millions of bytes. The rows that make one
    are estimated before anything is generated, from the input's footers and max_new_tokens
    (pipeline.planning.part_size): files are smaller where completions end early. None holds rows of two input files. At
    most 2000: a part is built in memory."""

    @property
    def part_limit(self) -> str:
        """How large a part may be, in words."""
        return f"at most {self.rows_per_file:,} rows" if self.rows_per_file else f"about {self.target_mb:,g} MB"

    @model_validator(mode="before")
    @classmethod
    def _default_rows(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("rows_per_file") is None and data.get("target_mb") is None:
            return {**data, "rows_per_file": 10_000}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rows_per_file is not None and self.target_mb is not None:
            raise ValueError("rows_per_file and target_mb are both given: keep one of them, the other is null")
        return self


class ModelSection(Section):
    """Which checkpoint, and how its weights are held."""

    checkpoint: Text
    """A folder (local or any fsspec URL) with config.json, safetensors and tokenizer.json, or "builtin:tiny"."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in memory."""


class GenerationSection(Section):
    """How a row is generated: the fields of model.requests.GenerationParams, explained there, and when once more."""

    mode: Mode = "diffusion"
    """diffusion: blocks by the denoiser. ar: the context tower alone. mock_ar: the denoiser, a token at a time."""
    max_new_tokens: int = 256
    """Tokens of a completion at most."""
    block_size: int = 16
    """Tokens a block (S)."""
    steps_per_block: int = 16
    """Denoiser forwards a block at most (T)."""
    confidence_threshold: float = 0.9
    """Predictions with a probability strictly above it are committed at once (gamma, 0 to 1)."""
    temperature: float = 0.0
    """0 is greedy; above it, tokens are sampled."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; null or 0 for all."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens that together reach this probability; null or 1 for all."""
    seed: int = 0
    """The same seed gives the same tokens, whatever the batch, the replica or the attempt."""
    eos_ids: Ids | None = None
    """Token ids that end a row; null: the checkpoint's own; []: none."""
    stop: Names = ()
    """Strings that end a row; the completion ends before the first of them."""
    on_degenerate: Literal["keep", "retry"] = "keep"
    """What to do with a completion of which a quarter or more is a loop (`repetition`, see pipeline.core.repetition).
    keep: it is written like any other. retry: the row is generated again, in diffusion at a threshold half way to 1,
    then in AR; the first try that is no loop is kept, else the one that loops least."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.params(())
        return self

    @property
    def towers(self) -> Towers:
        """What of the checkpoint a replica needs: AR runs on the context tower alone, half of the weights."""
        return "context" if self.mode == "ar" else "both"

    def params(self, default_eos: tuple[int, ...]) -> GenerationParams:
        """The engine's settings, with `default_eos` where the job names no EOS ids. Raises RequestError."""
        fields = self.model_dump(exclude={"on_degenerate"})
        if fields["eos_ids"] is None:
            fields["eos_ids"] = default_eos
        return GenerationParams(**fields)


class EngineSection(Section):
    """How much one replica's engine holds at once; changes speed and memory, never the completions."""

    max_rows: Annotated[int | Literal["auto"], BeforeValidator(_check_max_rows)] = 16
    """Rows generated together; auto: as many as the memory holds and the device makes use of."""
    max_prefill_tokens: int = 4096
    """Prompt tokens put through the context tower in one forward, padding counted; at least 64. A longer prompt goes in
    pieces."""
    max_context_tokens: int | None = None
    """Prompt + completion of one row at most, in tokens; null: what the checkpoint allows."""
    kv_tokens: int | None = None
    """Tokens of attention context for all rows together; null: sized from the above, within memory."""
    lanes: int | None = None
    """Groups of rows that take turns, so that every stage has work while the others compute; null: one a stage."""
    extend_every: int = 2
    """Turns of a lane from one context forward to the next: with 2 a finished block may wait for one turn, and more of
    them share a forward."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.limits()
        return self

    def limits(self) -> EngineLimits:
        """The engine's limits. Raises RequestError."""
        return EngineLimits(**self.model_dump())


class WorkersSection(Section):
    """The pool of replicas; each holds the whole model."""

    replicas: Annotated[int | Literal["auto"], BeforeValidator(_check_replicas)] = "auto"
    """How many; auto: as many as fit, more as nodes join."""
    gpus: int = Field(default=2, ge=0)
    """GPUs of a replica; 0: it computes on the CPU."""
    cpus: int = Field(default=1, ge=1)
    """CPU cores of a replica."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds to wait for the cluster to have room for the first replica."""


class FlushSection(Section):
    """How often the finished rows of a unit under way are written down: what a killed replica loses at most."""

    seconds: float = Field(default=30.0, gt=0)
    """Seconds from one flush of a unit to the next."""
    rows: int | None = Field(default=None, ge=1)
    """Finished rows after which a unit is flushed, however little time has passed; null: any number."""


class RetrySection(Section):
    """What is tried again, and when the job gives up."""

    attempts: int = Field(default=3, ge=1)
    """Tries of a unit whose replica died, until it is split to find the row that kills; tries of one that cannot be
    read or published, until the job ends."""
    stall_minutes: float = Field(default=30.0, gt=0)
    """Minutes without any progress after which a replica is replaced, or the job ended where none gets further."""
    max_error_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of error rows (0 to 1) above which the job ends with an error."""


class Job(Section):
    """One job file, checked whole."""

    name: Text | None = None
    """Shown in progress lines and reports; null: the job file's name without its ending."""
    input: InputSection
    output: OutputSection
    model: ModelSection
    generation: GenerationSection = GenerationSection()
    engine: EngineSection = EngineSection()
    workers: WorkersSection = WorkersSection()
    flush: FlushSection = FlushSection()
    retry: RetrySection = RetrySection()

    @model_validator(mode="before")
    @classmethod
    def _rename_old_keys(cls, data: Any) -> Any:
        # the plan.json of an older output, and settings made in Python, do not come by the loader
        return rename_old_keys(data) if isinstance(data, dict) else data
