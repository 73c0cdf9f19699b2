"""docs/configuration.md is the page that `make docs` makes of today's settings."""

from pathlib import Path

from pipeline.config.reference import make_reference

PAGE = Path(__file__).parents[3] / "docs/configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == make_reference(), "run `make docs`"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in make_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.endswith("|  |")]
