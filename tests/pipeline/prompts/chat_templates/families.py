"""The chat templates of this folder, with the control tokens of their families, and two ways to render them.

Each template is written for these tests and shows the habits of the family that its first line names. `rendered` uses
the code under test, and `reference` plain jinja2 as the transformers library sets it up.
"""

import json
import re
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.prompts.rendering.frames import REASON, pack_setup, unpack_prompt, unpack_setup
from pipeline.prompts.rendering.process import RowRenderer
from pipeline.prompts.setup import ChatSetup, PromptSetup
from pipeline.prompts.values import Prompt

DATE = "2024-07-05"
Messages = list[dict[str, Any]]
Made = tuple[Prompt | None, str | None]


@dataclass(frozen=True)
class Family:
    """A chat template, the control tokens of its tokenizer, and the tokens that the checkpoint names."""

    template: str
    control: tuple[str, ...] = ()
    tokens: dict[str, str] = field(default_factory=dict)

    def setup(self, **changes: Any) -> PromptSetup:
        """Return the setup of a job with this template. `changes` are fields of PromptSetup, or `system`."""
        chat = ChatSetup(self.template, DATE, self.tokens, changes.pop("system", None))
        return PromptSetup(("messages",), chat=chat, control_tokens=self.control, **changes)


FOLDER = Path(__file__).parent


def _family(name: str, tokens: dict[str, Any]) -> Family:
    return Family((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), tuple(tokens["control"]), tokens["tokens"])


FAMILIES = {
    name: _family(name, tokens)
    for name, tokens in json.loads((FOLDER / "tokens.json").read_text(encoding="utf-8")).items()
}


def expected(name: str) -> dict[str, Made]:
    """Return what a family makes of the conversations, by their names, from its file of expected prompts.

    After a line `## name` follows the prompt, with ⟦ and ⟧ around each control token, or `error: ` and the reason.
    """
    sections = (FOLDER / f"{name}.expected").read_text(encoding="utf-8").split("\n## ")[1:]
    pairs = (section.removesuffix("\n").split("\n", 1) for section in sections)
    return {
        title: (None, text.removeprefix("error: ")) if text.startswith("error: ") else (written(text), None)
        for title, text in pairs
    }


@lru_cache(maxsize=256)  # compiling a template takes longer than rendering it
def _renderer(setup: bytes) -> RowRenderer:
    return RowRenderer(unpack_setup(setup))


def rendered(family: Family, cells: "list[Any] | pa.Array[Any]", **changes: Any) -> list[Made]:
    """Return (prompt, None) or (None, reason) for each cell, made as the process that renders makes them."""
    table = pa.table({"messages": cells})
    frames = _renderer(pack_setup(family.setup(**changes))).render(table)
    return [(unpack_prompt(kind, data), None) if kind != REASON else (None, data.decode()) for kind, data in frames]


def made(family: Family, messages: Messages, **changes: Any) -> Made:
    """Return what `rendered` gives for one cell, a list of structs as Parquet holds it."""
    (outcome,) = rendered(family, [messages], **changes)
    return outcome


def written(text: str) -> Prompt:
    """Return the prompt that a text with every control token written as ⟦token⟧ stands for."""
    pieces, control, length = [], [], 0
    for index, piece in enumerate(text.replace("⟧", "⟦").split("⟦")):
        if index % 2:
            control.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return Prompt("".join(pieces), tuple(control))


def tokens_in(family: Family, text: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges of all control tokens that a text spells."""
    finder = re.compile("|".join(map(re.escape, sorted(family.control, key=len, reverse=True))))
    return tuple(match.span() for match in finder.finditer(text))


class _Generation(Extension):
    """The tag {% generation %} as the transformers library defines it: its inside is the caller of a function."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 defines it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], inside).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return str(caller())


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_raise_exception, strftime_now=date.fromisoformat(DATE).strftime)
    return made


@lru_cache(maxsize=256)
def _reference(template: str) -> Template:
    return _environment().from_string(template)


def reference(family: Family, messages: Messages) -> str:
    """Return the text that the transformers library makes of the messages. Raises what the template raises."""
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **family.tokens}
    return _reference(family.template).render(values)
