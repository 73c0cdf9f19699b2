"""Marks the control tokens that a template spells, so that they can be told from text of cells that spells the same.

Before a template is rendered, each control token in its own text and string constants is replaced by a mark: one
character of a private-use plane. If a cell contains such a character, it is escaped. So the marks in the rendered text
are exactly the template's own control tokens, whatever cells contain; a token that is half template and half cell is
none. After rendering, marks become their tokens again, and their places are noted.

Some chat templates put a token together around the role of a message, as in `'<|' + message.role + '|>'`. So in a chat
template the halves around a role are marks too, and two halves with one word between them become the token.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from pipeline.prompts.values import Prompt

FIRST_MARK, _ESCAPE, _SHIFT = 0x100000, "\U000f0000", 0x1000
"""The character of the first mark; the character that begins an escape; and the distance from an escaped character to
the character that follows the escape instead of it."""
_ROLE = re.compile(r"(?<!\w)(?:system|developer|user|assistant|model|tool|function|observation)(?!\w)", re.IGNORECASE)
"""A role in the text of a control token, such as `user` in `<|user|>`."""
MOST_TOKENS = 0x1000
"""The most different control tokens that the marks of a template can stand for."""


class Marks:
    """The marks of one template. Without control tokens, all methods return what they get."""

    def __init__(self, control_tokens: Iterable[str] = (), *, around_roles: bool = False) -> None:
        """Take the tokenizer's control tokens, and whether the template may put some of them together around a role."""
        self._tokens = frozenset(control_tokens) - {""}
        self._finder = _finder(self._tokens)
        found = [(token, role.span()) for token in self._tokens if around_roles for role in _ROLE.finditer(token)]
        halves = [(token[:start], token[end:]) for token, (start, end) in found if start > 0 and end < len(token)]
        self._head_finder = _finder({head for head, _ in halves}, r"(?:{})\Z")
        self._tail_finder = _finder({tail for _, tail in halves}, r"\A(?:{})")
        self._heads, self._tails = "", ""
        """The marks that stand for halves of tokens."""
        self._mark_of: dict[str, str] = {}
        self._token_of: dict[str, str] = {}
        """The token, or the half of one, that each mark stands for."""

    def __bool__(self) -> bool:
        """Return whether there are any marks."""
        return bool(self._token_of)

    def mark(self, text: str) -> str:
        """Return a text of the template with marks in place of its control tokens, and of halves at its ends.

        Characters that are marks already are escaped. Raises ValueError if there are more than MOST_TOKENS different
        tokens and halves.
        """
        if self._finder is None:
            return text
        pieces, end = list[str](), 0  # every second one is to become a mark
        for match in self._finder.finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        pieces.append(text[end:])
        if tail := self._tail_finder and self._tail_finder.search(pieces[0]):
            pieces[:1] = ["", tail[0], pieces[0][tail.end() :]]
            self._tails = _with(self._tails, self._new_mark(tail[0]))
        if head := self._head_finder and self._head_finder.search(pieces[-1]):
            pieces[-1:] = [pieces[-1][: head.start()], head[0], ""]
            self._heads = _with(self._heads, self._new_mark(head[0]))
        return "".join(self._new_mark(piece) if i % 2 else escape_all(piece) for i, piece in enumerate(pieces))

    def _new_mark(self, token: str) -> str:
        if token not in self._mark_of:
            if len(self._mark_of) == MOST_TOKENS:
                raise ValueError(f"template holds more than {MOST_TOKENS} different control tokens")
            mark = chr(FIRST_MARK + len(self._mark_of))
            self._mark_of[token], self._token_of[mark] = mark, token
        return self._mark_of[token]

    def cut(self, text: str, part: slice) -> str:
        """Return a slice of a text in which each mark counts as many characters as its token has.

        A token that the slice has in one piece stays one; of others only letters are left.
        """
        if not _MARKED.search(text):
            return text[part]
        letters, owners = list[str](), list[int]()
        for number, letter in enumerate(text):
            spelled = self._token_of.get(letter, letter)
            letters += spelled
            owners += [number] * len(spelled)
        letters, owners = letters[part], owners[part]
        pieces, at = [], 0
        while at < len(letters):
            number = owners[at]
            token = self._token_of.get(text[number], text[number])
            end = at + len(token)
            whole = "".join(letters[at:end]) == token and owners[at:end] == [number] * len(token)
            pieces.append(text[number] if whole else letters[at])
            at = end if whole else at + 1
        return "".join(pieces)

    def spelled(self, value: Any) -> Any:
        """Return the value with the texts of control tokens in place of marks, also inside lists, tuples and dicts."""
        if isinstance(value, str):
            return self.resolve(value).text if _MARKED.search(value) else value
        if isinstance(value, list | tuple):
            items = [self.spelled(item) for item in value]
            if any(item is not before for item, before in zip(items, value, strict=True)):
                return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {self.spelled(key): self.spelled(item) for key, item in value.items()}
        return value

    def spelled_in(self, text: str, wanted: str) -> str:
        """Return the text with the texts of control tokens in place of those marks that `wanted` holds."""
        for letter in set(wanted) & self._token_of.keys():
            text = text.replace(letter, self._token_of[letter])
        return text

    def resolve(self, text: str) -> Prompt:
        """Return the prompt that a rendered text stands for, with the places of its control tokens."""
        pieces: list[str] = []
        control: list[tuple[int, int]] = []
        end = length = 0
        if self._heads and self._tails:
            text = re.sub(rf"[{self._heads}]\w+[{self._tails}]", self._join_halves, text)
        for match in _MARKED.finditer(text):
            at = match.start()
            letter = text[at]
            token = self._token_of.get(letter)
            plain, piece = text[end:at], token or ""
            end = at + 1
            # An escape that the template has cut off from its character stands for nothing.
            if letter == _ESCAPE and _ESCAPED.match(text, end):
                piece = chr(ord(text[end]) + _SHIFT)
                end += 1
            length += len(plain)
            if token in self._tokens:
                control.append((length, length + len(piece)))
            length += len(piece)
            pieces += [plain, piece]
        pieces.append(text[end:])
        return Prompt("".join(pieces), tuple(control))

    def _join_halves(self, match: re.Match[str]) -> str:
        """Return the mark of the token that a head, a word and a tail make, or what was found if they make none."""
        found = match[0]
        token = self._token_of[found[0]] + found[1:-1] + self._token_of[found[-1]]
        return self._new_mark(token) if token in self._tokens else found


def _finder(texts: Collection[str], pattern: str = "{}") -> re.Pattern[str] | None:
    """Return a pattern that finds the longest of the texts, in the place of {} in a pattern; None without texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(pattern.format("|".join(map(re.escape, longest_first)))) if longest_first else None


def _with(marks: str, mark: str) -> str:
    return marks if mark in marks else marks + mark


def may_hold_marks(data: bytes) -> bool:
    """Return False if no text in these bytes of UTF-8 has a character that escape_all would escape."""
    return any(code in data for code in _IN_UTF8)


def escape_all(text: str) -> str:
    """Return the text of a cell with every character escaped that is a mark or begins an escape."""
    if text.isascii():
        return text
    return _MARKED.sub(lambda match: _ESCAPE + chr(ord(match[0]) - _SHIFT), text)


_MARKS = f"{chr(FIRST_MARK)}-{chr(FIRST_MARK + MOST_TOKENS - 1)}"
_MARKED = re.compile(f"[{_ESCAPE}{_MARKS}]")
_ESCAPED = re.compile(
    f"[{chr(FIRST_MARK - _SHIFT)}-{chr(FIRST_MARK - _SHIFT + MOST_TOKENS - 1)}{chr(ord(_ESCAPE) - _SHIFT)}]"
)
_IN_UTF8 = (b"\xf4", _ESCAPE.encode())
"""Text in UTF-8 that has a mark or an escape has one of these sequences of bytes."""
