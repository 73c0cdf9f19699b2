"""Tests of the names of input files."""

import unicodedata

from pipeline.input.files import _CONTROL


def test_control_characters_are_those_of_unicode() -> None:
    letters = map(chr, range(0x3000))
    assert all((_CONTROL.match(letter) is not None) == (unicodedata.category(letter) == "Cc") for letter in letters)
