"""Compiles and renders prompt templates in the sandbox of jinja2.

This module limits what a template can access. pipeline.prompts.renderer limits the time and memory that it can take, in
a process of its own; no other process evaluates any expression of a template.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.prompts.values import MAX_PROMPT_CHARS

if TYPE_CHECKING:
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import SandboxedEnvironment

MAX_TEMPLATE_CHARS, MAX_EXPRESSIONS = 1_000_000, 2_000
"""The most characters in a template, and the most `{{` and `{%`. A template within the limits compiles in seconds."""
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.)", re.DOTALL)


@lru_cache(maxsize=1)
def _environment() -> "SandboxedEnvironment":
    from jinja2 import StrictUndefined, nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        """A code generator that evaluates no expression and collects the names of the columns that a template reads.

        jinja2's own generator would replace `{{ 'x' * 10 ** 10 }}` by its value.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.optimizer = None
            self.columns: set[str] = set()

        def enter_frame(self, frame: Any) -> None:
            super().enter_frame(frame)
            # jinja2.meta finds undeclared variables in the same way, but it folds constants.
            self.columns.update(name for action, name in frame.symbols.loads.values() if action == "resolve")

        def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
            if not isinstance(node, nodes.TemplateData):
                raise nodes.Impossible
            return super()._output_child_to_const(node, frame, finalize)

        def visit_ScopedEvalContextModifier(  # noqa: N802
            self, node: nodes.ScopedEvalContextModifier, frame: Any
        ) -> None:
            del frame
            self.fail("autoescape is not for prompts", node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        """A sandbox that refuses `*` and `%` before they run if they would make a huge value from small ones."""

        code_generator_class = Generator
        intercepted_binops = frozenset(("*", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                _check_product(left, right)
            elif isinstance(left, str):
                _check_widths(left, right if isinstance(right, tuple) else (right,))
            return super().call_binop(context, operator, left, right)

    environment = Environment(undefined=StrictUndefined, autoescape=False, optimized=False, cache_size=0)
    environment.filters["format"] = _format
    del environment.filters["random"]  # the same row must give the same prompt in every attempt
    # Without jinja2's own functions every free name is a column, so `range` or `dict` cannot hide a column silently.
    environment.globals.clear()
    return environment


def template_columns(template: str) -> tuple[str, ...]:
    """Return the names of the columns that a template reads, sorted, without evaluating any of its expressions.

    Raises ValueError (one line) if the template does not compile, is too long or reads no column.
    """
    from jinja2 import TemplateSyntaxError

    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"template has {len(template)} characters, above the limit of {MAX_TEMPLATE_CHARS}")
    if (expressions := template.count("{{") + template.count("{%")) > MAX_EXPRESSIONS:
        raise ValueError(f"template has {expressions} expressions, above the limit of {MAX_EXPRESSIONS}")
    try:
        environment = _environment()
        generator: CodeGenerator = environment.code_generator_class(environment, None, None)
        generator.visit(environment.parse(template))
        columns: set[str] = generator.columns  # type: ignore[attr-defined]
        environment.compile(template)  # Python itself refuses blocks that are nested too deeply
    except TemplateSyntaxError as error:
        raise ValueError(f"template, line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError):  # SyntaxError: Python's own limit for nested blocks
        raise ValueError("template is nested too deeply") from None
    if not columns:
        raise ValueError("template reads no column, so all prompts would be the same: use {{ column }}")
    return tuple(sorted(columns))


class Template:
    """A compiled template. Rendering may take any time and memory, so only pipeline.prompts.render_process does it."""

    def __init__(self, template: str) -> None:
        """Compile the template. Raises ValueError if it is wrong (see template_columns)."""
        self.columns = template_columns(template)
        """The names of the columns that the template reads, sorted."""
        self._template = _environment().from_string(template)

    def render(self, cells: Sequence[Any]) -> str:
        """Return the text for a row. `cells`: the row's values in the order of `columns`.

        A text above MAX_PROMPT_CHARS is not complete: it ends after the piece that exceeds the limit. Raises any error
        that the template raises.
        """
        return _join(self._template.generate(zip(self.columns, cells, strict=True)))


def _join(pieces: Iterator[str]) -> str:
    taken, length = [], 0
    for piece in pieces:
        taken.append(piece)
        length += len(piece)
        if length > MAX_PROMPT_CHARS:
            break
    return "".join(taken)


def _format(text: str, *values: Any, **named: Any) -> str:
    """Return the result of jinja2's filter `format`. Raises ValueError first if the text has a huge width."""
    from jinja2.filters import do_format

    _check_widths(str(text), values)
    return do_format(text, *values, **named)


def _check_widths(text: str, values: tuple[Any, ...]) -> None:
    following = iter(values)
    for width, precision, conversion in _CONVERSION.findall(text):
        for size in (width, precision):
            number = next(following, 0) if size == "*" else int(size or 0)
            if isinstance(number, int) and abs(number) > MAX_PROMPT_CHARS:
                raise ValueError(f"a format with a width above {MAX_PROMPT_CHARS}")
        if conversion != "%":
            next(following, None)


def _check_product(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(times, int) and len(text) * times > MAX_PROMPT_CHARS:
            raise ValueError(f"a product of more than {MAX_PROMPT_CHARS} characters")
