"""The messages that docs/recovery.md quotes are what the program prints."""

import pytest

from tests.docs.messages import ROOT, is_printed, quoted, read_templates

TEMPLATES = read_templates()


def test_every_quoted_message_is_printed() -> None:
    """Each text in double quotes on the page is a text of the source. `…` stands for what varies."""
    wrong = [text for text in quoted((ROOT / "docs/recovery.md").read_text()) if not is_printed(text, TEMPLATES)]
    assert not wrong, "no code prints this; write … for what varies, or quote the pieces one by one"


@pytest.mark.parametrize(
    "message",
    [
        "submit the same job again to resume",
        "stopped; …; submit the same job again to resume",
        "another driver of this job took over output … (…); it continues the job",
        "dead: no driver seems to be running: …",
        "… found, and nothing wrong with the rows: the exit code is",
        "remove with `clean`",
        "its process has died, killed or crashed, often at the memory limit of the container or node: give the",
    ],
)
def test_a_message_of_the_program_is_found(message: str) -> None:
    """Also one with variable parts, one that leaves something out, and one that ends with a shared advice."""
    assert is_printed(message, TEMPLATES)


@pytest.mark.parametrize(
    "message",
    [
        "submit the same job once more to resume",
        "another driver of this job took over output out (pid 7)",  # the variable parts are not marked
        "Return the templates of all messages",
        "Write and read commit records, the plan, the manifest",
        "…",
        "… of …",
        "submit the same job again to resume … another driver of this job took over output",  # the other way round
    ],
)
def test_a_message_that_nothing_prints_is_not_found(message: str) -> None:
    assert not is_printed(message, TEMPLATES)


def test_docstrings_are_no_messages() -> None:
    assert not is_printed("Return the text of each finding", TEMPLATES)
    assert not is_printed("Turn the project's own errors into one line on stderr", TEMPLATES)


def test_quotes_are_read_from_the_page() -> None:
    page = 'a "first … message", `{"code": "here"}`\n| x | "remove with `clean` \\| or\nnot" | "last" |\n'
    page += '```sh\n"no"\n```\n'
    assert quoted(page) == ["first … message", "remove with `clean` | or not", "last"]
