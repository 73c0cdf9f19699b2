"""Decides how the prompts of a job are made, from its settings, its checkpoint and the columns of its input."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from model.checkpoint.chat_texts import ChatTexts
from model.checkpoint.reader import Checkpoint
from pipeline.config.job import InputSection
from pipeline.core.errors import CheckpointError, InputError
from pipeline.planning.checkpoint import load_tokenizer
from pipeline.planning.footers import Footer, distinct
from pipeline.prompts.setup import RULES, ChatSetup, PromptSetup
from pipeline.prompts.template import check_chat_template, reads_all_columns, resolve_columns
from pipeline.storage.storage import FileInfo
from pipeline.storage.urls import safe_url

Footers = Sequence[tuple[FileInfo, Footer]]


@dataclass(frozen=True, slots=True)
class ModelTexts:
    """The texts of a checkpoint that prompts may need."""

    control_tokens: tuple[str, ...] = ()
    """The texts of the tokenizer's control tokens."""
    chat: ChatTexts = field(default_factory=ChatTexts)
    """The chat template, and the named control tokens that it may print."""


def today() -> str:
    """Return the current day in UTC, as YYYY-MM-DD."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


@dataclass(frozen=True, slots=True)
class Begun:
    """The facts about prompts that an output was begun with. A new output has the defaults."""

    rules: int = RULES
    """The version of the rules by which prompts are made (pipeline.prompts.setup.RULES)."""
    date: str = field(default_factory=today)
    """The day that a chat template may print, as YYYY-MM-DD."""
    maybe_old: bool = False
    """True if the output may also have been begun with version 1 of these rules: its plan is lost, and the records in
    parts of that time do not name the version. The fingerprint then tells which it was."""


def read_model_texts(settings: InputSection, checkpoint: Checkpoint) -> ModelTexts:
    """Return the texts of the checkpoint that the prompts of a job need. Raises CheckpointError if there are messages,
    but no chat template that can be used."""
    if settings.prompt_column is not None:
        return ModelTexts()
    tokens = load_tokenizer(checkpoint).control_tokens
    if settings.messages_column is None:
        return ModelTexts(tokens)
    chat = checkpoint.chat_texts()
    if chat.template is None:
        raise CheckpointError(
            f"checkpoint {safe_url(checkpoint.uri)} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), which input.messages_column needs. For lists of structs, this can take its place:",
            advice=template_advice(settings.messages_column),
        )
    try:
        check_chat_template(chat.template)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {safe_url(checkpoint.uri)}: its chat {error}") from None
    return ModelTexts(tokens, chat)


def template_advice(column: str) -> str:
    """Return a template that makes prompts of the messages in a column, as it stands in a job file below `input:`.

    For a row whose list is null or empty, it makes an error row.
    """
    messages = column if column.isidentifier() else f"row['{column}']"
    return (
        "  template: |-\n"
        "    {% for m in " + messages + " %}{{ m.role }}: {{ m.content }}\n"
        "    {% else %}{{ " + messages + "[0] }}\n"
        "    {% endfor %}assistant:"
    )


def make_setup(settings: InputSection, footers: Footers, texts: ModelTexts, begun: Begun) -> PromptSetup:
    """Return how the prompts of a job are made.

    Raises InputError (which names the file) if a template reads a column that is not there, or all columns of files
    that have different ones.
    """
    if settings.prompt_column is not None:
        rules = min(begun.rules, RULES)
        return PromptSetup((settings.prompt_column,), special_tokens=settings.special_tokens, rules=rules)
    chat = None
    if settings.messages_column is not None:
        chat = ChatSetup(texts.chat.template or "", begun.date, dict(texts.chat.tokens), settings.system)
        columns: tuple[str, ...] = (settings.messages_column,)
    else:
        columns = _template_columns(settings.template or "", footers)
    return PromptSetup(
        columns,
        settings.template,
        chat,
        nulls=settings.nulls,
        special_tokens=settings.special_tokens,
        control_tokens=texts.control_tokens,
    )


def _template_columns(template: str, footers: Footers) -> tuple[str, ...]:
    """Return the columns that the template reads. A name that is a column in one file must be one in all of them."""
    everywhere = dict.fromkeys(name for _, footer in distinct(footers) for name in footer.schema.names)
    try:
        columns = resolve_columns(template, everywhere)
    except ValueError as error:
        info, footer = footers[0]
        raise InputError(f"{info.name}: {error}; its columns: {', '.join(footer.schema.names) or 'none'}") from None
    if reads_all_columns(template, columns):
        _check_same_columns(footers)
    return columns


def prompt_columns_in(settings: InputSection, available: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that prompts are made of, from a file with the `available` columns; it may lack the column of
    prompts or messages. Raises ValueError if it lacks a column that the template reads."""
    if settings.template is not None:
        return resolve_columns(settings.template, available)
    return (getattr(settings, settings.prompt_source),)


def _check_same_columns(footers: Footers) -> None:
    first, first_footer = footers[0]
    for info, footer in distinct(footers):
        if odd := set(footer.schema.names) ^ set(first_footer.schema.names):
            raise InputError(
                f"the template reads all columns of a row through `row`, but column '{min(odd)}' is not in both of "
                f'{first.name} and {info.name}: make their columns the same, or name columns as row["x"]'
            )
