"""Checks templates and finds the columns that they read, without evaluating any of their expressions.

The job file is checked with the names alone, and planning decides with the columns of the input what each name means.
pipeline.prompts.rendering renders templates, in a process of its own.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from pipeline.prompts.setup import PromptSetup

MAX_TEMPLATE_CHARS, MAX_EXPRESSIONS = 1_000_000, 2_000
"""The most characters in a template, and the most `{{` and `{%`. A template within the limits compiles in seconds."""


@dataclass(frozen=True, slots=True)
class TemplateNames:
    """The names that a template reads, before it is known which columns the input has."""

    free: frozenset[str]
    """The names that the template reads and does not set itself: columns, functions such as `range`, and `row`."""
    assigned: frozenset[str]
    """The names among them that the template also sets, under a condition: columns only if the input has them."""
    row_keys: frozenset[str]
    """The columns that it reads with a constant key: {{ row['doc id'] }}."""
    whole_row: bool
    """Whether it uses `row` in another way, so that it may read any column."""


@lru_cache(maxsize=8)
def template_names(template: str) -> TemplateNames:
    """Return the names that a template reads, without evaluating any of its expressions.

    Raises ValueError (one line) if the template does not compile, is too long or reads no column whatever the input
    has.
    """
    names = _names(template, chat=False)
    if not names.free:
        raise ValueError("template reads no column, so all prompts would be the same: use {{ column }}")
    return names


def names_in(setup: PromptSetup) -> TemplateNames:
    """Return the names that the template, or the chat template, of a setup reads. Raises ValueError as template_names
    and check_chat_template do."""
    return template_names(setup.template or "") if setup.chat is None else check_chat_template(setup.chat.template)


def check_chat_template(template: str) -> TemplateNames:
    """Return the names that a chat template reads. Raises ValueError (one line) if it does not compile or is too
    long."""
    return _names(template, chat=True)


def _names(template: str, *, chat: bool) -> TemplateNames:
    from jinja2 import TemplateSyntaxError

    from pipeline.prompts.rendering.generator import Generator
    from pipeline.prompts.rendering.marks import Marks
    from pipeline.prompts.rendering.sandbox import TemplateEnvironment

    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"template has {len(template)} characters, above the limit of {MAX_TEMPLATE_CHARS}")
    if (expressions := template.count("{{") + template.count("{%")) > MAX_EXPRESSIONS:
        raise ValueError(f"template has {expressions} expressions, above the limit of {MAX_EXPRESSIONS}")
    try:
        environment = TemplateEnvironment(Marks(), chat=chat)
        generator = Generator(environment, None, None)
        generator.visit(environment.parse(template))
        environment.compile(template)  # Python itself refuses blocks that are nested too deeply
    except TemplateSyntaxError as error:
        raise ValueError(f"template, line {error.lineno}: {error.message}{_hint(error)}") from None
    except (RecursionError, MemoryError, SyntaxError):  # SyntaxError: Python's own limit for nested blocks
        raise ValueError("template is nested too deeply") from None
    free = frozenset(generator.free)
    return TemplateNames(free, free & generator.assigned, frozenset(generator.row_keys), generator.whole_row)


def _hint(error: Exception) -> str:
    """Return a hint for a name such as `doc id` in the place of an expression, "" for other errors."""
    text = str(error)
    broken = "expected token 'end of print statement'" in text or "unexpected char" in text
    return "; a column whose name is not a plain word is written {{ row['doc id'] }}" if broken else ""


def resolve_columns(template: str, available: Collection[str]) -> tuple[str, ...]:
    """Return the columns that a template reads from input files with the `available` columns, in their order.

    A free name is a column if there is one of that name, else a function such as `range`, or `row`. Raises ValueError
    (which reads on after the name of a file) if it is neither, or if the template reads no column at all.
    """
    from pipeline.prompts.rendering.generator import FUNCTIONS, REFUSED_NAMES, ROW

    names, have = template_names(template), set(available)
    wanted = {name for name in names.free if name in have or (name not in FUNCTIONS and name not in names.assigned)}
    if ROW in wanted and ROW not in have:
        wanted = (wanted - {ROW}) | (have if names.whole_row else names.row_keys)
    for name in sorted(wanted - have):
        if name in REFUSED_NAMES:
            raise ValueError(f"the template reads `{name}`: {REFUSED_NAMES[name]}")
        raise ValueError(f"the template reads column '{name}', which is not there{_meant(name, available)}")
    if not wanted:
        raise ValueError("the template reads no column, so all prompts would be the same: use {{ column }}")
    return tuple(name for name in dict.fromkeys(available) if name in wanted)


def reads_all_columns(template: str, columns: Collection[str]) -> bool:
    """Return whether a template reads all columns through `row`. `columns`: the result of resolve_columns."""
    from pipeline.prompts.rendering.generator import ROW

    names = template_names(template)
    return names.whole_row and ROW not in columns and ROW not in names.assigned


def hidden_words(template: str, columns: Collection[str]) -> list[str]:
    """Return the words of templates, such as `range`, that the template reads as columns. `columns`: the result of
    resolve_columns."""
    from pipeline.prompts.rendering.generator import FUNCTIONS, ROW

    free = template_names(template).free
    return [name for name in columns if name in free and (name == ROW or name in FUNCTIONS)]


def _meant(name: str, available: Iterable[str]) -> str:
    """Return a hint if there is a column whose name begins with this word, such as `text.body` for `text`."""
    longer = next((other for other in available if other.startswith(name) and not other[len(name)].isalnum()), None)
    return "" if longer is None else f"; column '{longer}' is written {{{{ row['{longer}'] }}}}"
