"""The messages that pages quote, and the texts in the source that the program can print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
VARIABLE = "\0"
"""Stands in a template for a part that the program fills in."""
LEAST_LETTERS = 10
"""The fewest letters of a quoted message, apart from its variable parts: a shorter one would be found anywhere."""


def quoted(page: str) -> list[str]:
    """Return the texts in double quotes of a page in Markdown, each on one line. Code is left out, unless it is inside
    the quotes."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    found = (match[1] for match in re.finditer(r'`[^`]*`|"([^"]*)"', text))
    return [" ".join(message.replace(r"\|", "|").split()) for message in found if message is not None]


def is_printed(message: str, templates: list[str]) -> bool:
    """Return whether a message is what one of the templates prints, or a piece of it. `…` in the message stands for
    variable parts and for what it leaves out; every other character must be a constant one of the template."""
    pieces = [piece for piece in message.split("…") if piece]
    if sum(map(str.isalpha, "".join(pieces))) < LEAST_LETTERS:
        return False
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
    return any(pattern.search(template) for template in templates)


def read_templates() -> list[str]:
    """Return every text in the source that is not a docstring, on one line, with VARIABLE for each variable part.

    A variable part that is a module's constant text, such as an advice that several messages share, is put in.
    """
    trees = [
        ast.parse(path.read_text()) for top in ("pipeline", "workers", "model") for path in (ROOT / top).rglob("*.py")
    ]
    shared: dict[str, str] = {}
    for _ in range(2):  # a constant may contain another one
        shared |= {name: text for tree in trees for name, text in _constants(tree, shared)}
    return [" ".join(text.split()) for tree in trees for text in _texts(tree, shared)]


def _constants(tree: ast.Module, shared: dict[str, str]) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.Assign([ast.Name(name)], value) if (text := _text(value, shared)) is not None:
                yield name, text


def _texts(node: ast.AST, shared: dict[str, str]) -> Iterator[str]:
    """Yield the whole texts in a part of the source: not the pieces of each."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return
    if isinstance(node, ast.expr) and (text := _text(node, shared)) is not None:
        yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(node, ast.JoinedStr) or not isinstance(child, ast.Constant):
            yield from _texts(child, shared)


def _text(node: ast.AST, shared: dict[str, str]) -> str | None:
    """Return the text of an expression, with VARIABLE for its variable parts; None if it is not a text."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(values):
            return "".join(_text(value, shared) or VARIABLE for value in values)
        case ast.FormattedValue(ast.Name(name)) | ast.FormattedValue(ast.Attribute(_, name)):
            return shared.get(name, VARIABLE)
        case ast.FormattedValue():
            return VARIABLE
        case ast.BinOp(left, ast.Add(), right):
            parts = _text(left, shared), _text(right, shared)
            return None if parts == (None, None) else "".join(part or VARIABLE for part in parts)
    return None
