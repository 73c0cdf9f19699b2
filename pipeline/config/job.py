"""Defines every setting of a job, and refuses unknown keys, wrong types and impossible values.

The text below a field explains it; pipeline.config.reference makes docs/configuration.md of these texts.

The allowed values of `generation` and `engine` are defined only in `model.requests`. The sections here build the
objects of that module, which check the values, and pass their messages on.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr, model_validator

from model.checkpoint.config import Towers
from model.requests import EngineLimits, GenerationParams, Mode
from pipeline.prompts.setup import Nulls, SpecialTokens
from pipeline.prompts.template import template_names

Text = Annotated[StrictStr, Field(min_length=1)]  # not empty
Names = Annotated[tuple[Text, ...], Field(strict=False)]  # YAML has only lists: accept them as tuples
Ids = Annotated[tuple[StrictInt, ...], Field(strict=False)]

_PROMPT_SOURCES = ("prompt_column", "template", "messages_column")

OLD_KEYS: Mapping[str, str] = {"checkpoint": "flush"}
"""Top-level keys that had another name in earlier versions: old name -> current name. The old names still work."""


def rename_old_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a job under their current keys. Raises ValueError if a key is given under both names."""
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
    """The base of all sections of a job. Its objects are frozen. Unknown keys are refused, and types are not converted:
    "16" is not a number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RowSettingsSection(Section):
    """Input columns that give each row generation settings of its own. In a null cell, and for settings without a
    column, the job's value applies. An impossible value makes its row an error row."""

    max_new_tokens: Text | None = None
    """The integer column with the largest number of completion tokens of each row; null: generation.max_new_tokens for
    all rows."""
    temperature: Text | None = None
    """The integer or float column with the sampling temperature of each row; null: generation.temperature for all
    rows."""
    confidence_threshold: Text | None = None
    """The integer or float column with the confidence threshold of each row; null: generation.confidence_threshold for
    all rows."""
    seed: Text | None = None
    """The integer column with the seed of each row; null: generation.seed for all rows."""
    stop: Text | None = None
    """The column of strings, or of lists of strings, with the stop strings of each row; null: generation.stop for all
    rows. A cell replaces generation.stop, and an empty list means no stop strings."""

    @property
    def columns(self) -> dict[str, str]:
        """Return the name of the column of each setting that has one, by the name of the setting."""
        return self.model_dump(exclude_none=True)


class InputSection(Section):
    """The input files, and what their columns are used for."""

    path: Text
    """The Parquet file, the folder (all *.parquet files below it) or the glob to read: a local path or any fsspec URL,
    such as s3://bucket/prompts/. A relative path starts at the current folder. Names that begin with _ or . are left
    out. Local links are followed. The job is refused if nothing is found."""
    prompt_column: Text | None = None
    """The column that holds the prompt, of strings or of bytes that are UTF-8; null: the template or the messages are
    used, or the column `prompt` if there are none. A row with a null or empty prompt becomes an error row."""
    template: Text | None = None
    """A jinja2 template that makes the prompt from the columns of a row, such as "Summarise: {{ title }}\\n{{ body }}";
    docs/prompts.md says what it can do. A column whose name is not a plain word is written {{ row['doc id'] }}. Only
    one of prompt_column, template and messages_column can be given. A row that takes more than 2 s of computing or 1
    GiB of memory becomes an error row."""
    messages_column: Text | None = None
    """The column that holds the messages of a chat: lists of structs with the fields `role` and `content`, or strings
    that hold such a list as JSON. The chat template of the checkpoint makes the prompt of them, up to the point at
    which the assistant answers."""
    system: Text | None = None
    """The system message that is put in front of the messages of a row without one; null: none is. It needs
    messages_column."""
    nulls: Nulls = "error"
    """The treatment of a null cell that a template prints, or of a null inside a cell that is printed by itself. error:
    the row becomes an error row, whose text names the column. empty: the null counts as empty text. It does not matter
    for a template that deals with nulls itself, as {{ title | default('n/a') }} does."""
    special_tokens: SpecialTokens = "template"
    """The texts that become control tokens if they spell one, such as <eos>. template: only the template's own text,
    its string constants and the chat template; what comes from cells is text, whatever it spells. all: cells as well.
    none: nothing. Tokens that the tokenizer itself puts in front of a prompt, such as BOS, are always there, once."""
    id_column: Text | None = None
    """The column of integers, strings or bytes (UTF-8) that becomes `id` in the output; null: ids are `<file>#<row>`.
    Repeated ids are kept and counted."""
    carry: Names = ()
    """The columns that are copied to the output unchanged."""
    row_settings: RowSettingsSection = RowSettingsSection()
    """The columns of the input that hold generation settings."""
    on_change: Literal["error", "extend"] = "error"
    """The reaction to an input whose files differ from those in the plan of the output folder, if the folder holds
    finished rows. error: the job is refused, with the names of the files. extend: added files are taken as well, but
    the job is refused if planned files were removed or rewritten; this is meant for scheduled jobs."""

    @property
    def prompt_source(self) -> str:
        """Return the name of the setting that says what prompts are made of, such as `template`."""
        return next(name for name in _PROMPT_SOURCES if getattr(self, name) is not None)

    def columns_with(self, prompt_columns: Iterable[str]) -> list[str]:
        """Return the names of all input columns that the job reads, each once: those of the prompts (which planning
        finds, see PromptSetup.columns), the id column, the carried columns and those of the row settings."""
        names = [*prompt_columns, self.id_column, *self.carry, *self.row_settings.columns.values()]
        return [name for name in dict.fromkeys(names) if name is not None]

    @model_validator(mode="before")
    @classmethod
    def _default_prompt(cls, data: Any) -> Any:
        if isinstance(data, dict) and all(data.get(name) is None for name in _PROMPT_SOURCES):
            return {**data, "prompt_column": "prompt"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in _PROMPT_SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both given: keep one of them")
        if self.system is not None and self.messages_column is None:
            raise ValueError("system is given without messages_column: write it into the template instead")
        if self.template is not None:
            template_names(self.template)
        return self


class OutputSection(Section):
    """The output folder, and the size of the files in it."""

    path: Text
    """The folder for the output of this job alone: a local path or any fsspec URL. Submitting the same job again
    resumes from what is there. A folder with finished rows of another job is refused."""
    rows_per_file: int | None = Field(default=None, ge=1)
    """The largest number of rows in one output file, which is the unit of work, of retry and of resume. A larger input
    file is cut, and smaller ones are put together, up to 1,000 of them. null: target_mb is used, or 10,000 rows if that
    is null too."""
    target_mb: float | None = Field(default=None, gt=0, le=2000)
    """The approximate size of one output file in MB (millions of bytes); it cannot be combined with rows_per_file. The
    number of rows, at most 1,000,000, is estimated from the input's footers and max_new_tokens before anything is
    generated (pipeline.planning.part_size), so files are smaller if completions end early. At most 2000, because a part
    is built in memory."""

    keep_prompt: bool = False
    """Whether the output has a column `prompt` with the text of each row's prompt, in which control tokens are spelled
    out. It is null in rows that have no prompt. input.carry cannot name a column `prompt` then."""

    @property
    def part_limit(self) -> str:
        """Return the limit on the size of a part for people to read: `at most 10,000 rows` or `about 256 MB`."""
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
    """The checkpoint, and the type of its weights in memory."""

    checkpoint: Text
    """The folder (a local path or any fsspec URL) with config.json, the safetensors files and tokenizer.json, or
    `builtin:tiny` for the small model that comes with this project."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of the weights in memory. bfloat16 takes half the memory of float32, and rounds more."""


class GenerationSection(Section):
    """The settings for generating a row (the fields of model.requests.GenerationParams), and the treatment of loops."""

    mode: Mode = "diffusion"
    """The way to generate. diffusion: the denoiser tower fills blocks of tokens. ar: the context tower alone generates
    one token at a time, and a replica loads only half of the weights. mock_ar: the denoiser tower generates one token
    at a time."""
    max_new_tokens: int = 256
    """The largest number of tokens in a completion, at least 1; a completion that reaches it ends with finish_reason
    `length`. It need not be a multiple of block_size. If the prompt and so many tokens exceed the context, the row
    becomes an error row."""
    block_size: int = 16
    """The number of tokens in a block (S), at least 1. The released model was trained with 16, and its text degenerates
    with larger blocks."""
    steps_per_block: int = 16
    """The largest number of denoiser forwards for a block (T), at least 1. Each forward commits enough tokens to finish
    the block within this number; at 1, it commits all of them."""
    confidence_threshold: float = 0.9
    """The probability (gamma, 0 to 1) above which a predicted token is committed at once. A lower value takes fewer
    forwards; at 1 no prediction is above it, and each forward commits only as many tokens as it must."""
    temperature: float = 0.0
    """The sampling temperature, at least 0. At 0 the likeliest token is always chosen (greedy); above 0, tokens are
    sampled from softmax(logits / temperature)."""
    top_k: int | None = None
    """The number of likeliest tokens to sample from, at least 0; null or 0: all tokens."""
    top_p: float | None = None
    """The probability, above 0 and at most 1, that the tokens to sample from must reach together: the fewest likeliest
    tokens that do so are taken. null or 1: all tokens."""
    seed: int = 0
    """The seed of the sampling, 0 to 2**63 - 1. A sampled token depends on the seed, the file and row, the block,
    the step and the position, but not on the batch, the replica or the attempt."""
    eos_ids: Ids | None = None
    """The token ids that end a completion; null: those of the checkpoint; []: none."""
    stop: Names = ()
    """The strings that end a completion, which is cut off before the first of them: at most 256, each of 1 to 4096
    characters."""
    on_degenerate: Literal["keep", "retry"] = "keep"
    """The treatment of a completion of which a quarter or more is a loop (column `repetition`). keep: it is written
    like any other. retry: the row is generated again, in mode diffusion with a confidence_threshold half way to 1
    (unless that would change nothing, as with steps_per_block 1), then in mode ar. The first completion below a quarter
    is kept, else the one with the smallest share of loop. In mode mock_ar, the row is generated again only in mode ar;
    in mode ar, it is not. A row whose first completion is an error is not generated again."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.params(())
        return self

    @property
    def towers(self) -> Towers:
        """Return the towers that a replica must load: only the context tower in mode ar, else both."""
        return "context" if self.mode == "ar" else "both"

    def params(self, default_eos: tuple[int, ...]) -> GenerationParams:
        """Return these settings in the form that the engine takes, with `default_eos` if eos_ids is null.

        Raises RequestError if a value is impossible.
        """
        fields = self.model_dump(exclude={"on_degenerate"})
        if fields["eos_ids"] is None:
            fields["eos_ids"] = default_eos
        return GenerationParams(**fields)


class EngineSection(Section):
    """The limits of what the engine of one replica holds at once. They change speed and memory, not the completions;
    only a row that is too long for them becomes an error row."""

    max_rows: Annotated[int | Literal["auto"], BeforeValidator(_check_max_rows)] = 16
    """The largest number of rows that are generated together, at least 1; auto: as many as fit in memory, but at most
    256 on GPUs and 32 on a CPU, because more would not be faster. If memory runs out, the replica continues with
    fewer."""
    max_prefill_tokens: int = 4096
    """The largest number of prompt tokens, with padding, in one forward of the context tower; at least 64, one page of
    the context cache. A longer prompt is split over several forwards."""
    max_context_tokens: int | None = None
    """The largest number of tokens in prompt and completion of one row together, at least 2; null: as many as the
    checkpoint allows. A row whose prompt and max_new_tokens exceed it becomes an error row. The job is refused if it is
    above what the checkpoint allows or leaves no room for a prompt."""
    kv_tokens: int | None = None
    """The number of tokens in the context cache for all rows together, at least 2 and at least max_context_tokens;
    null: enough for max_rows rows of full length, or as many as fit in memory. If the pages run out, the youngest row
    is preempted and generated again later. A row that needs more tokens than this becomes an error row."""
    lanes: int | None = None
    """The number of lanes, at least 1 and at most max_rows: groups of rows that take turns, so that each stage has work
    while the others compute. null: one for each stage."""
    extend_every: int = 2
    """The number of turns of a lane from one context forward to the next, at least 1. With 2, a finished block may wait
    for one turn, and more blocks share a forward."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.limits()
        return self

    def limits(self) -> EngineLimits:
        """Return these limits in the form that the engine takes. Raises RequestError if one is impossible."""
        return EngineLimits(**self.model_dump())


class WorkersSection(Section):
    """The pool of replicas. Each replica holds the whole model."""

    replicas: Annotated[int | Literal["auto"], BeforeValidator(_check_replicas)] = "auto"
    """The number of replicas, at least 1; auto: as many as the cluster has room for, and more as nodes join. There are
    never more replicas than units left. If the cluster has room for fewer, the job runs on those."""
    gpus: int = Field(default=2, ge=0)
    """The number of GPUs of one replica, over which the layers are split; 0: it computes on the CPU."""
    cpus: int = Field(default=1, ge=1)
    """The number of CPU cores of one replica."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds to wait while the cluster has no room for a single replica; then the job ends with an error."""


class FlushSection(Section):
    """The times at which the finished rows of a unit are flushed to segments before its part is complete. A replica
    that is killed loses what it finished since the last flush, and the rows in its engine."""

    seconds: float = Field(default=30.0, gt=0)
    """Seconds from one flush of a unit to the next. With a lower value, a replica that dies loses less, but more
    segments are written."""
    rows: int | None = Field(default=None, ge=1)
    """The number of finished rows after which a unit is flushed even if flush.seconds have not passed; null: only the
    time counts."""


class RetrySection(Section):
    """The number of retries, and the conditions under which the job gives up."""

    attempts: int = Field(default=3, ge=1)
    """The number of attempts at a unit, at least 1. If its replica dies so many times, the unit is split until the row
    that kills replicas is found, which becomes an error row. If reading a unit fails so many times, see on_bad_unit; if
    saving its rows does, the job ends."""
    on_bad_unit: Literal["set_aside", "fail"] = "set_aside"
    """What to do with a unit that cannot be read, for example because a file is damaged. set_aside: finish all other
    rows, then end with exit code 1 and name what is missing. fail: end the job at once."""
    stall_minutes: float = Field(default=30.0, gt=0)
    """Minutes without any progress after which a replica is replaced. If replacements make no progress either and no
    row is generated for twice as long, the job ends."""
    max_error_rate: float = Field(default=0.1, ge=0, le=1)
    """The share of error rows (0 to 1) above which the job ends with an error. 0 allows no error row, 1 any number.
    While the job runs, it is checked once units with at least 100 rows have begun; at the end it is always checked."""


class Job(Section):
    """All settings of a job. They are the content of a job file."""

    name: Text | None = None
    """The name of the job in progress lines, reports and the manifest; null: the name of the job file without its
    ending."""
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
        # The loader has renamed the keys of a job file. This is for plan.json of an older output and for settings that
        # are made in Python.
        return rename_old_keys(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.output.keep_prompt and (taken := [name for name in self.input.carry if name.casefold() == "prompt"]):
            raise ValueError(
                f"output.keep_prompt adds a column prompt, and input.carry copies column '{taken[0]}' to that name: "
                "keep one of them"
            )
        return self
