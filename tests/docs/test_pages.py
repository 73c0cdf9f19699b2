"""The pages of the documentation: their commands exist, their links lead somewhere, and the README stays short."""

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.pages import commands_of, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
ELSEWHERE = {
    "source": "tests/end_to_end/test_readme.py calls the environment's Python directly",
    "ray job submit": "tests/end_to_end/test_job_submit.py submits jobs to a real head",
    "python -m model.memory.fit": "tests/model/memory/test_planner.py",
}
"""Start of a command that is not checked here -> the place that runs it, or the reason."""


def commands() -> list[tuple[str, str]]:
    """Return (page, command) for each line of each sh block, without comments and leading variables."""
    return [
        (page.relative_to(ROOT).as_posix(), re.sub(r"^(\w+=\S+ )+", "", line.partition(" #")[0].strip()))
        for page in PAGES
        for line in commands_of(page.read_text())
    ]


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_exists(page: str, command: str) -> None:
    """A target of the Makefile, a command line that the program parses, or one that another test runs."""
    program, *words = shlex.split(command)
    if program == "make":
        assert all(re.search(rf"^{target}:.*## ", MAKEFILE, re.MULTILINE) for target in words)
    elif program == "twotower":
        parse(words)
    else:
        assert any(command.startswith(start) for start in ELSEWHERE), f"{page} tells to run {command!r}, no test does"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    for name in set(re.findall(r"`((?:model|pipeline|workers|tests|jobs|infra)/[\w/.-]+\.\w+)`", page.read_text())):
        assert (ROOT / name).is_file(), name


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        name = page.relative_to(ROOT)
        assert f"({name})" in readme or f"({name.parent})" in readme, name
