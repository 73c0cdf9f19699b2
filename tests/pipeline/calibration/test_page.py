"""Tests of report.html: it is one complete file, it fetches and runs nothing, and any prompt is safe in it."""

import io
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.calibration.finish import finish
from pipeline.calibration.run import measure
from pipeline.monitoring.progress import LineDisplay
from pipeline.pages import page
from tests.pipeline.calibration.cases import FakeBench, job_file, setup_of

pytestmark = pytest.mark.slow

HOSTILE = [
    "<script>alert(1)</script></pre><img src=x onerror=alert(1)> word",
    "x" * 5000 + " word",
    "\u0645\u0631\u062d\u0628\u0627 word \u202eabc\u202c",
    "bell \x07 nul \x00 escape \x1b[31m word\r\n",
    "{{ 7 * 7 }} word {% raw %} &amp; \"quoted' \ue000",
]
VOID = {"meta", "br", "img", "use", "path", "stop"}


class Page(HTMLParser):
    """A parsed page: the tags that are still open, all tags with their attributes, and all texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report(folder: Path, prompts: list[str | None] | None = None, speedup: float = 2.4) -> str:
    file = job_file(folder, prompts=prompts)
    bench = FakeBench(speedup=speedup)
    outcome = measure(setup_of(file), bench, LineDisplay(io.StringIO()), threading.Event(), bench.clock)
    finish(outcome, str(file), [])
    return (folder / "out-calibration/report.html").read_text()


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(tmp_path_factory.mktemp("usual"))


def test_it_is_one_whole_page_that_fetches_and_runs_nothing(usual: str) -> None:
    page = Page(usual)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "image"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), tag
    assert not re.search(r"url\((?!#)", usual)
    assert "@import" not in usual


def test_it_says_the_verdict_first_and_holds_all_points(usual: str) -> None:
    page = Page(usual)
    said = " ".join(" ".join(page.texts).split())
    assert said.index("Diffusion with threshold") < said.index("Quality and speed")
    assert "times as fast as AR" in said
    assert sum(tag == "tr" for tag, _ in page.tags) > 15 + 8
    for part in ("agreement with AR", "tokens per denoiser forward", "prompt tokens", "device of the replica", "0.9"):
        assert part in said


def test_the_charts_are_text_and_follow_the_pages_colours(usual: str) -> None:
    charts = re.findall(r'<svg class="large".*?</svg>', usual, re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        assert "<text" in chart
        assert 'class="s0 ' in chart
        assert not re.search(r'#[0-9a-f]|rgb|(fill|stroke|style|id|width|height)="', chart)


def test_the_same_measurements_make_the_same_page(usual: str, tmp_path: Path) -> None:
    """Only the time and the input differ."""
    without = re.compile(r"<td>(written|input)</td>.*?</tr>", re.DOTALL)
    assert without.sub("", usual) == without.sub("", report(tmp_path))


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path) -> None:
    text = report(tmp_path, [*HOSTILE])
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    assert "49" not in text[text.index("Texts side by side") : text.index("The sample")]
    assert max(map(len, text.split("\n"))) < 20_000


def test_where_ar_is_faster_it_says_so_at_the_top(tmp_path: Path) -> None:
    said = " ".join(Page(report(tmp_path, speedup=0.3)).texts)
    assert said.index("AR alone is faster for this workload") < said.index("Quality and speed")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b\r", "\u2400\u241b\u240d"),
        ("\u202e\u2066\x85\ue000", "⟨U+202E⟩⟨U+2066⟩⟨U+0085⟩⟨U+E000⟩"),
        ("x" * 12, "x" * 10 + "… (2 more characters)"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str, seen: str) -> None:
    assert page.shown(text, 10) == seen
