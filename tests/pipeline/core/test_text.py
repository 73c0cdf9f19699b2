"""Tests of how foreign texts are shown in a terminal."""

import ast
import random
import unicodedata

import pytest

from pipeline.core.text import LINE_END, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("What is 47 + 38?\nAnswer:", "What is 47 + 38?⏎Answer:"),
        ("a\tb\r\n", r"a\tb\r⏎"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31mred\x85\x00\x7f", r"\x9b31mred\x85\x00\x7f"),
        ("a\u202eb\u2066c\u200e", r"a\u202eb\u2066c\u200e"),
        ("a\u200bb\ufeffc\u00add\u2028e\U000e0041", r"a\u200bb\ufeffc\xadd\u2028e\U000e0041"),
        ("\u3164\ufe00\U000e0101", r"\u3164\ufe00\U000e0101"),
        ("\ud800 \ue000 \U000fffff", r"\ud800 \ue000 \U000fffff"),
        (r"C:\new \x1b", r"C:\\new \\x1b"),
        ("⏎", r"\u23ce"),
        (" Answer:  ", r" Answer: \x20"),
        ("é e\u0301 \u00a0 \u3000 日本 ❤\ufe0f हिन्दी", "é e\u0301 \u00a0 \u3000 日本 ❤\ufe0f हिन्दी"),
    ],
)
def test_everything_in_a_text_is_seen_and_nothing_reaches_the_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(text, max(5, len(shown))) == shown


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert visible("abcdefghij", 10) == "abcdefghij"
    assert visible("abcdefghijk", 10) == "abcd … ijk"
    assert visible("abcdefghijk", 5) == "a … k"
    assert visible("\n" * 9 + "x", 5) == "⏎ … x"


def test_no_escape_is_cut_and_the_limit_counts_escapes() -> None:
    assert visible("\x1b" * 4, 16) == r"\x1b" * 4
    assert visible("\x1b" * 4, 15) == r"\x1b … \x1b"
    assert visible("abcdefgh ", 12) == r"abcdefgh\x20"
    assert visible("abcdefghij ", 12) == r"abcde … \x20"
    assert visible("abcdefghij ", 7) == "ab … "
    assert visible("ab\x1bcd" * 3, 12) == "ab … cd"


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ValueError, match="4 characters are too few"):
        visible("abc", 4)


def random_text(draw: random.Random) -> str:
    kinds = ("abc \\", "\n\t\r\x1b", "\u202e\u200b⏎", "日\U0001f600", "\ud812\ue000\U000e0001")
    return "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(60)))


def test_random_texts_read_back_and_fit() -> None:
    """Whatever the text, the whole result reads back as the text, the shortened one has at most the characters that
    were asked for, and both hold only characters that a terminal prints."""
    draw = random.Random(7)
    for _ in range(3000):
        text, chars = random_text(draw), draw.randrange(5, 80)
        whole, short = visible(text), visible(text, chars)
        assert ast.literal_eval(f"'{whole.replace(LINE_END, chr(92) + 'n')}'") == text
        assert len(short) <= chars
        assert short == whole if len(whole) <= chars else " … " in short
        begin, _, end = short.partition(" … ")
        assert whole.startswith(begin)
        assert whole.endswith(end)
        assert not {unicodedata.category(letter) for letter in whole + short} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl"}


def test_a_huge_text_is_not_read_as_a_whole() -> None:
    """A text of which only the ends may be looked at: slices of more than the limit fail."""

    class Ends(str):
        __slots__ = ()

        def __getitem__(self, at: object) -> str:
            found = super().__getitem__(at)  # type: ignore[index]
            assert len(found) <= 100
            return found

        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError("the whole text was read")

    assert len(visible(Ends("x" * 10_000), 100)) == 100
