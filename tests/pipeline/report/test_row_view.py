"""Tests of the lines in which a row is shown: they fit a terminal, show every character, and obey none."""

import datetime
from typing import Any

import pytest
from rich.cells import cell_len

from pipeline.prompts.values import CellError
from pipeline.report.row_view import row_lines

ROW: dict[str, Any] = {
    "id": "order-7",
    "finish_reason": "stop",
    "error": None,
    "completion": " Dear Carla,\nthank you.",
    "mode": "diffusion",
    "completion_tokens": 35,
    "denoiser_forwards": 9,
    "tokens_per_forward": 35 / 9,
    "latency_s": 0.5312,
    "attempt": 1,
    "source_file": "a.parquet",
    "source_row": 7,
}


def shown(row: dict[str, Any], width: int = 80, *, full: bool = False) -> list[str]:
    """Return the lines of a row like ROW, in which `row` replaces values and adds carried columns."""
    return list(row_lines({**ROW, **row}, [name for name in row if name not in ROW], width, full=full))


def test_a_row_is_shown_with_its_columns_and_its_statistics() -> None:
    row = {
        "prompt": "Write.\nAnswer: ",
        "task": "letter",
        "n": 3,
        "tags": ["x", None],
        "day": datetime.date(2026, 1, 2),
    }
    assert shown(row) == [
        "order-7  a.parquet#7  stop",
        "  task        letter",
        "  n           3",
        '  tags        ["x", null]',
        "  day         2026-01-02",
        r"  prompt      Write.⏎Answer:\x20",
        "  completion   Dear Carla,⏎thank you.",
        "  stats       35 tokens, 9 forwards, 3.89 tokens/forward, 0.531 s, attempt 1",
    ]


def test_an_error_row_shows_its_error() -> None:
    failed = {"finish_reason": "error", "error": "prompt is null", "completion": None, "id": "a.parquet#7"}
    assert shown({**failed, "prompt": None}) == [
        "a.parquet#7  error",
        "  prompt  null",
        "  error   prompt is null",
    ]
    assert shown({**failed, "completion": "so far"})[1:] == ["  completion  so far", "  error       prompt is null"]


def test_rows_without_forwards_ids_and_texts() -> None:
    last = shown({"mode": "ar", "denoiser_forwards": 0, "tokens_per_forward": None, "completion_tokens": 1})[-1]
    assert last == "  stats       1 token, mode ar, 0.531 s, attempt 1"
    assert shown({"id": None, "completion": "", "note": ""})[:3] == [
        "null  a.parquet#7  stop",
        "  note        (empty)",
        "  completion  (empty)",
    ]
    assert (
        shown({"far": CellError("holds a date in the year 99999")})[1]
        == "  far         (holds a date in the year 99999)"
    )


def test_long_texts_are_shortened_in_the_middle_and_full_shows_them() -> None:
    text = "\n".join(f"line {number} of the text" for number in range(100))
    short, full = (shown({"prompt": text, "note": text}, 60, full=whole) for whole in (False, True))
    assert len(short) <= 1 + 1 + 5 + 1 + 2
    assert short[1] == "  note        line 0 of the text⏎lin … t⏎line 99 of the text"
    assert short[2].startswith("  prompt      line 0 of the text⏎line 1")
    assert "".join(line[14:] for line in short[2:-3]).endswith("text⏎line 99 of thetext")
    assert sum(" … " in line for line in short) == 2
    assert [line[14:] for line in full[101:201]] == [f"line {n} of the text⏎" for n in range(99)] + [
        "line 99 of the text"
    ]


@pytest.mark.parametrize("width", [0, 40, 57, 80, 200])
def test_lines_fit_whatever_the_texts_are(width: int) -> None:
    """Wide characters take two columns, and long names, ids and words must be broken too."""
    texts = ["日本語の文章。" * 40, "word " * 100, "x" * 3000, "\x1b[31m" * 50, "a\u0301" * 200, "\U0001f600" * 90]
    for text in texts:
        row = {"id": text, "completion": text, "prompt": text, "finish_reason": "error", "error": text, "n" * 300: text}
        for full in (False, True):
            lines = shown(row, width, full=full)
            assert max(map(cell_len, lines)) <= max(40, width)
            assert len(lines) < 60 or full
            assert "\x1b" not in "".join(lines)


def test_lines_end_between_words_where_there_are_any() -> None:
    text = "one  two   three " * 30 + "日本" * 50 + "\nend"
    shown_lines = shown({"prompt": text, "completion": ""}, 60, full=True)
    lines = [line[14:] for line in shown_lines[1:-3]]
    assert lines[:2] == ["one  two   three one  two   three one  two", "three one  two   three one  two   three one"]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "⏎")
    assert lines[-1] == "end"
    assert {cell_len(line) for line in lines[-5:-3]} == {46}
