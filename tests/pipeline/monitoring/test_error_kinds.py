"""Tests of the kinds of error texts: which texts differ, what is left out, and that there are only a few kinds."""

import pytest

from pipeline.core.error_kinds import KINDS, OTHER, ErrorCount, ErrorKinds, without_quotations


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("template: could not convert string to float: 'my secret prompt'", "to float: '…'"),
        ('template: invalid literal: "it\'s a secret"', "invalid literal: '…'"),
        (r"template: invalid literal: 'it\'s \"a\" secret'", "invalid literal: '…'"),
        ("template: invalid literal: 'secret that was cut off at 300 char…", "invalid literal: '…'"),
        ("column 'body' holds bytes that are not UTF-8", "column 'body' holds"),
        ("the model's logits were not finite after 3 tokens: the prompt's fault", "the model's logits were not finite"),
    ],
)
def test_what_an_error_quotes_is_left_out_and_column_names_are_not(text: str, shown: str) -> None:
    assert shown in without_quotations(text)
    assert "secret" not in without_quotations(text)


def test_kinds_differ_by_words_not_by_numbers_or_rows() -> None:
    kinds = ErrorKinds()
    kinds.add("a#1", "5,120 prompt tokens exceed 4096")
    kinds.add("a#2", "9000 prompt tokens exceed 4096")
    kinds.add("a#3", "prompt is null")
    kinds.merge([ErrorCount("prompt is null", 3, "b#0: prompt is null")])
    assert kinds.counts() == (
        ErrorCount("prompt is null", 4, "a#3: prompt is null"),
        ErrorCount("N prompt tokens exceed N", 2, "a#1: 5,120 prompt tokens exceed 4096"),
    )


def test_kinds_are_few_and_short_whatever_the_texts_are() -> None:
    kinds = ErrorKinds()
    for i in range(1000):
        kinds.add(f"a#{i}", f"unforeseen {'x' * i}")
    counts = kinds.counts()
    assert len(counts) == KINDS + 1
    assert sum(count.rows for count in counts) == 1000
    assert counts[0].kind == OTHER
    assert max(len(count.kind) + len(count.example) for count in counts) <= 300
