"""Makes the jinja2 environments in which templates are compiled and rendered.

This module limits what a template can access. pipeline.prompts.renderer limits the time and memory that it can take, in
a process of its own.
"""

from collections.abc import Callable
from datetime import date, time
from typing import Any

from jinja2 import StrictUndefined, Undefined
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from pipeline.prompts.rendering.filters import guarded_filters, guarded_tests
from pipeline.prompts.rendering.generator import GenerationBlock, Generator
from pipeline.prompts.rendering.marks import Marks, escape_all
from pipeline.prompts.rendering.nulls import Null, text_of
from pipeline.prompts.rendering.printing import (
    EscapingFormatter,
    Formatter,
    as_argument,
    as_printed,
    as_text,
    check_conversions,
    check_product,
)
from pipeline.prompts.rendering.text_methods import key_in, prepare_call

_CLOCK = frozenset({"now", "today", "utcnow", "fromtimestamp", "utcfromtimestamp"})
"""The methods of dates and times that read the clock: the same row must give the same prompt in every attempt."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox for one template, which refuses `*` and `%` before they run if they would make a huge value."""

    code_generator_class = Generator
    intercepted_binops = frozenset(("*", "%"))

    def __init__(self, marks: Marks, *, chat: bool = False) -> None:
        """Take the marks of the template. A `chat` template gets the settings and functions that such templates
        expect."""
        super().__init__(
            undefined=Undefined if chat else StrictUndefined,
            autoescape=False,
            optimized=False,
            cache_size=0,
            finalize=as_printed,
            trim_blocks=chat,
            lstrip_blocks=chat,
            keep_trailing_newline=not chat,
            extensions=[loopcontrols, GenerationBlock],
        )
        self.marks = marks
        self.filters = guarded_filters(self.filters, marks, chat=chat)
        self.tests = guarded_tests(self.tests, marks)
        # A template gets its functions with its columns, so that a column may have the name of a function.
        self.globals.clear()

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """See SandboxedEnvironment."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, date | time) and attr in _CLOCK)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See SandboxedEnvironment."""
        if self.marks and isinstance(obj, dict) and isinstance(argument, str):
            argument = key_in(self.marks, obj, argument)
        elif self.marks and isinstance(obj, str) and isinstance(argument, int):
            obj = self.marks.spelled(obj)
        return super().getitem(obj, argument)

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """Return a slice of a text or a list. In a text, a control token has as many characters as its text."""
        part = slice(start, stop, step)
        return self.marks.cut(value, part) if self.marks and isinstance(value, str) else value[part]

    def join(self, values: tuple[Any, ...]) -> str:
        """Return the values as one text (the operator `~`)."""
        return "".join([value if type(value) is str else as_text(value) for value in values])

    def is_in(self, item: Any, values: Any) -> bool:
        """Return whether a text, a list or a struct holds an item (the operator `in`)."""
        if isinstance(item, Null) and isinstance(values, str):
            item = text_of(item)
        if self.marks:
            item, values = self.marks.spelled(item), self.marks.spelled(values)
        return item in values

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        if operator == "*":
            check_product(left, right)
        elif isinstance(left, str):
            check_conversions(left, right if isinstance(right, tuple) else (right,))
            right = tuple(map(as_argument, right)) if isinstance(right, tuple) else as_argument(right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See SandboxedEnvironment."""
        method, args, kwargs, escape = prepare_call(__self.marks, __obj, args, kwargs)
        result = super().call(__context, method, *args, **kwargs)
        return escape_all(result) if escape and isinstance(result, str) else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See SandboxedEnvironment."""
        if super().wrap_str_format(value) is None:
            return None
        text: Any = value.__self__
        formatter = EscapingFormatter(self, escape=text.escape) if isinstance(text, Markup) else Formatter(self)
        make = type(text)
        if value.__name__ == "format_map":
            return lambda values: make(formatter.vformat(text, (), values))
        return lambda *args, **kwargs: make(formatter.vformat(text, args, kwargs))
