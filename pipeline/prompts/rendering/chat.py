"""Makes the values that a chat template works with of the messages in a cell. Only the process that renders templates
uses this module."""

import json
from collections.abc import Mapping
from datetime import date, datetime, time
from functools import partial
from typing import Any, NoReturn

from pipeline.prompts.rendering.cells import ListCell, StructCell
from pipeline.prompts.rendering.marks import Marks, escape_all
from pipeline.prompts.rendering.nulls import Null
from pipeline.prompts.setup import ChatSetup
from pipeline.prompts.values import error_line

ROLE, CONTENT = "role", "content"
SYSTEM_ROLES = ("system", "developer")


class MessagesError(ValueError):
    """A cell does not hold the messages of a chat. The message reads on after the name of the column."""


class ChatTemplateError(ValueError):
    """A chat template refuses the messages, with `raise_exception`."""


def read_messages(column: str, cell: Any, null: type[Null], marks: Marks) -> ListCell:
    """Return the messages in a cell: a list of structs, or text that is such a list in JSON.

    Each message has a role, and a content that may be null. All other fields that are null are left out, in messages
    and inside them, because a struct of Parquet has all fields and chat templates ask whether a field is there. Only
    the text of a part of type "text" stays. `marks`: those of the chat template. Raises MessagesError if the cell holds
    no messages.
    """
    if isinstance(cell, Null):
        raise MessagesError("is null")
    try:
        if isinstance(cell, str):
            cell = _parsed(column, cell, null, marks)
        if not isinstance(cell, list):
            raise MessagesError(f"holds {_kind(cell)}: it must hold a list of messages")
        if not cell:
            raise MessagesError("holds no messages")
        return ListCell(_message(column, index, each, null) for index, each in enumerate(cell))
    except RecursionError:
        raise MessagesError("holds JSON that is nested too deeply") from None


def _parsed(column: str, text: str, null: type[Null], marks: Marks) -> Any:
    """Return the value of a JSON text as pipeline.prompts.rendering.cells makes it of a cell."""
    try:
        # JSON can spell any character with an escape such as \u00e9, so only its value shows what has to be escaped.
        value = json.loads(marks.spelled(text) if marks else text)
    except ValueError as error:
        raise MessagesError(f"holds text that is not JSON: {error_line(error)}") from None
    return _with_nulls(column, value, "", null, escape=bool(marks))


def _with_nulls(column: str, value: Any, place: str, null: type[Null], *, escape: bool) -> Any:
    if value is None:
        return null(column, place)
    if isinstance(value, str):
        return escape_all(value) if escape else value
    if isinstance(value, list):
        return ListCell(_with_nulls(column, item, f"{place}[{i}]", null, escape=escape) for i, item in enumerate(value))
    if isinstance(value, dict):
        return StructCell(
            {
                escape_all(key) if escape else key: _with_nulls(column, item, f"{place}.{key}", null, escape=escape)
                for key, item in value.items()
            }
        )
    return value


def _message(column: str, index: int, message: Any, null: type[Null]) -> StructCell:
    if not isinstance(message, dict):
        raise MessagesError(
            f"holds a message [{index}] that is {_kind(message)}: it must be a struct with the fields role and content"
        )
    role = message.get(ROLE)
    if role is None or isinstance(role, Null):
        raise MessagesError(f"holds a message [{index}] without a role")
    if not isinstance(role, str):
        raise MessagesError(f"holds a message [{index}] whose role is {_kind(role)}: it must be text")
    kept = _without_nulls(message)
    if CONTENT not in kept:
        kept[CONTENT] = null(column, f"[{index}].{CONTENT}")
    return StructCell(kept)


def _without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null. The text of a part of type "text" stays: if it is null, the
    content is, and only a null makes an error row of that."""
    if isinstance(value, list):
        return ListCell(_without_nulls(item) for item in value)
    if isinstance(value, dict):
        is_text = value.get("type") == "text"
        return StructCell(
            {
                key: _without_nulls(item)
                for key, item in value.items()
                if not isinstance(item, Null) or (is_text and key == "text")
            }
        )
    return value


def _kind(value: Any) -> str:
    """Return a word for the type of a value, with its article."""
    if isinstance(value, Null):
        return "null"
    kinds = ((str, "text"), (bool, "a boolean"), (int | float, "a number"), (dict, "a struct"), (list, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


class Chat:
    """The values that a chat template works with."""

    def __init__(self, setup: ChatSetup, tokens: Mapping[str, str], marks: Marks) -> None:
        """Take the setup, the checkpoint's named control tokens as the template is to print them, and its marks."""
        self._system = setup.system if setup.system is None or not marks else escape_all(setup.system)
        self._day = datetime.combine(date.fromisoformat(setup.date), time())
        self._values = {
            **tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "raise_exception": partial(_raise_exception, marks),
            "strftime_now": self._day.strftime,
        }

    def values(self, messages: ListCell) -> dict[str, Any]:
        """Return the values of the template's free names for these messages."""
        if self._system is not None and not any(message[ROLE] in SYSTEM_ROLES for message in messages):
            messages = ListCell([StructCell({ROLE: "system", CONTENT: self._system}), *messages])
        return {**self._values, "messages": messages}


def _raise_exception(marks: Marks, message: Any) -> NoReturn:
    raise ChatTemplateError(marks.spelled(str(message)))
