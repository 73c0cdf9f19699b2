"""Compiles the template, or the chat template, of a setup, and renders it."""

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import nodes

from pipeline.prompts.rendering.cells import StructCell
from pipeline.prompts.rendering.generator import FUNCTIONS, ROW
from pipeline.prompts.rendering.marks import Marks, escape_all
from pipeline.prompts.rendering.sandbox import TemplateEnvironment
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.template import names_in
from pipeline.prompts.values import MAX_PROMPT_CHARS, Prompt


class Template:
    """A compiled template. Rendering may take any time and memory, so only the process that renders does it."""

    def __init__(self, setup: PromptSetup) -> None:
        """Compile the template, or the chat template, of the setup. Raises ValueError if it is wrong."""
        names = names_in(setup)
        chat = setup.chat is not None
        text = setup.chat.template if setup.chat is not None else setup.template or ""
        control_tokens = setup.control_tokens if setup.special_tokens == "template" else ()
        self.marks = Marks(control_tokens, around_roles=chat)
        environment = TemplateEnvironment(self.marks, chat=chat)
        tree = environment.parse(text)
        _mark_texts(tree, self.marks)
        tokens = setup.chat.tokens if setup.chat is not None else {}
        self.tokens = {name: self.marks.mark(token) for name, token in tokens.items()}
        """The checkpoint's named control tokens, as the chat template gets them."""
        given = names.free - set(() if chat else setup.columns)  # a column wins over a function
        self._functions = {name: FUNCTIONS[name] for name in given & FUNCTIONS.keys()}
        self._with_row = not chat and ROW in given - names.assigned
        self._template = environment.template_class.from_code(environment, environment.compile(tree), {})

    def render(self, values: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a row. `values`: its cells by column, or the values that a chat template gets.

        A text above MAX_PROMPT_CHARS is not complete: it ends after the piece that exceeds the limit. Raises any error
        that the template raises.
        """
        known = {**self._functions, **values}
        if self._with_row:
            known[ROW] = StructCell({self._key(name): cell for name, cell in values.items()})
        template = self._template
        text = _join(template.root_render_func(template.new_context(known, shared=True)))
        return self.marks.resolve(text) if self.marks else Prompt(text)

    def _key(self, name: str) -> str:
        return escape_all(name) if self.marks else name


def _mark_texts(tree: nodes.Template, marks: Marks) -> None:
    """Replace the control tokens in the text and the string constants of a parsed template by marks."""
    for data in tree.find_all(nodes.TemplateData):
        data.data = marks.mark(data.data)
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            constant.value = marks.mark(constant.value)


def _join(pieces: Iterator[str]) -> str:
    taken, length = [], 0
    for piece in pieces:
        taken.append(piece)
        length += len(piece)
        if length > MAX_PROMPT_CHARS:
            break
    return "".join(taken)
