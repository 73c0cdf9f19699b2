"""Describes how the prompts of a job are made, as its planning has decided it."""

from dataclasses import dataclass, field
from typing import Literal

Nulls = Literal["error", "empty"]
"""The treatment of a null that a template prints: its row becomes an error row, or the null counts as empty text."""
SpecialTokens = Literal["template", "all", "none"]
"""The places in which a text that spells a control token is one: the template's own text, everywhere, or nowhere."""

RULES = 2
"""The version of the rules by which prompts are made and tokenised. It is part of the fingerprint and must change with
any change of a prompt's text or tokens. Outputs from before it existed have version 1: the text of a prompt column was
tokenised with all control tokens that it spells."""


@dataclass(frozen=True, slots=True)
class ChatSetup:
    """The chat template of a checkpoint, and the values that it may read besides the messages."""

    template: str
    """The text of the chat template."""
    date: str
    """The day that `strftime_now` formats, as YYYY-MM-DD: the one on which the output was begun, so that a resume makes
    the same prompts."""
    tokens: dict[str, str] = field(default_factory=dict)
    """The checkpoint's named control tokens, such as bos_token, by name."""
    system: str | None = None
    """The system message that is put in front of messages without one; None: none is."""


@dataclass(frozen=True, slots=True)
class PromptSetup:
    """Everything besides the rows that decides how prompts are made. All replicas of a job get the same one.

    Prompts are made of `template`, or of the messages in the only column if there is a `chat`, or they are the text of
    the only column.
    """

    columns: tuple[str, ...]
    """The input columns that prompts are made of. A free name of the template that is not among them is one of the
    template's own functions, such as `range`, or `row`."""
    template: str | None = None
    """The job's template (input.template)."""
    chat: ChatSetup | None = None
    """The chat template, if the job has input.messages_column."""
    nulls: Nulls = "error"
    special_tokens: SpecialTokens = "template"
    control_tokens: tuple[str, ...] = ()
    """The texts of the tokenizer's control tokens. Only templates need them, to find those that they spell."""
    rules: int = RULES
    """The version of the rules (see RULES)."""
