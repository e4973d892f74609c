"""``gppf-ds report``: one file, looked at in a real browser at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from analysis import browser
from conftest import SHORT_STEPS

from gppf_ds.analysis import commands, html
from gppf_ds.analysis.route_section import routes_section
from gppf_ds.analysis.run_files import read_files
from gppf_ds.errors import UserError
from gppf_ds.train.route_record import read_routes

torch.set_num_threads(1)
SECTIONS = ["Results", "Curves", "Routes", "Time", "Predictions", "Recipe"]
DESK, PHONE = 1280, 390
LEGIBLE = 0.7
"""Of their natural size charts must have at least; their letters are then 9 pixels high."""


@pytest.fixture(scope="module")
def page(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert commands.report([str(short_run), "--output", str(target)]) == 0
    return target


class Reader(HTMLParser):
    """Addresses that a page names, and whether its elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_all_it_shows(page: Path) -> None:
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert all(address.startswith(("data:image/", "#")) for address in reader.addresses)
    assert "http://" not in re.sub(r"data:image/[^\"]+", "", text)
    assert "Run two &lt;tasks&gt;" in text
    assert "two <tasks>" not in text
    assert "zero_stage: 0" in text  # the recipe
    assert text.count("data:image/jpeg") == 6


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


IMAGES = """[...document.images].map((one) => (
    {alt: one.alt, natural: one.naturalWidth, width: one.clientWidth}))"""


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_it_shows_in_a_browser_without_a_mistake(window: browser.Page, page: Path, width: int) -> None:
    window.open(page, width)
    assert window.mistakes == []
    assert window.fetched == []
    assert window.run("[...document.querySelectorAll('h2')].map((one) => one.textContent)") == SECTIONS
    assert window.run("innerWidth") == width
    assert window.run("document.documentElement.scrollWidth") == width, "the page is wider than the window"
    images = window.run(IMAGES)
    assert len(images) > 12
    for image in images:
        assert image["alt"]
        assert 200 < image["width"] <= width
        if "finds in it" not in image["alt"]:
            assert image["width"] / image["natural"] >= LEGIBLE, image["alt"]


ROUTES = """({shown: document.getElementById("route-shown").textContent,
    cells: [...document.querySelectorAll("#route-map td")].map((one) => one.textContent),
    colours: [...document.querySelectorAll("#route-map td")].map((one) => one.style.background)})"""
TO_THE_FIRST = """{const slider = document.getElementById("route-step");
    slider.value = 0; slider.dispatchEvent(new Event("input"));}"""


def test_the_slider_goes_back_in_time(window: browser.Page, page: Path, short_run: Path) -> None:
    record = read_routes(short_run)
    assert record is not None
    record = record.ordered(["digits", "distance"])
    window.open(page, DESK)
    last = window.run(ROUTES)
    window.run(TO_THE_FIRST)
    first = window.run(ROUTES)
    for shown, at in ((first, 0), (last, -1)):
        values = record.probabilities[at].reshape(10, 3)
        units, percent = values.argmax(1), (100 * values.max(1)).round()
        assert shown["shown"] == f"step {record.steps[at]}"
        assert shown["cells"] == [f"{unit}{int(p)} %" for unit, p in zip(units, percent, strict=True)]
    assert first["colours"] != last["colours"]
    # A layer of one unit is certain; where two are as likely as each other, white is mixed into the colour.
    assert first["colours"][3] == "rgb(0, 114, 178)"
    assert first["colours"][0] == "rgb(166, 206, 228)"


def test_playing_ends_at_the_last_step(window: browser.Page, page: Path, short_run: Path) -> None:
    window.open(page, DESK)
    window.run("document.getElementById('route-play').click()")
    assert window.run(ROUTES)["shown"] == "step 0"
    ended = """new Promise((resolve) => { const wait = setInterval(() => {
        if (document.getElementById("route-play").textContent === "play") { clearInterval(wait); resolve(true); }
    }, 50); })"""
    assert window.run(ended)
    assert window.run(ROUTES)["shown"] == f"step {SHORT_STEPS}"


def test_it_prints(window: browser.Page, page: Path) -> None:
    window.open(page, DESK)
    paper = window.paper()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 14
    assert window.run("[...document.querySelectorAll('details')].every((one) => one.open)")


def test_a_run_that_left_little_says_so(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    shutil.copy(short_run / "config.yaml", run)
    assert commands.report([str(run)]) == 0
    text = (run / "report.html").read_text()
    sentences = ("has not been evaluated yet", "no metrics.jsonl yet", "no routes.jsonl", "no time.jsonl")
    assert all(sentence in text for sentence in (*sentences, "has no complete checkpoint"))
    with pytest.raises(UserError, match=r"is no run"):
        commands.report([str(tmp_path / "nowhere")])


def test_the_headline_of_a_task_whose_data_are_gone_is_what_was_recorded(short_run: Path) -> None:
    class Gone:
        @property
        def headline(self) -> str:
            raise UserError("annotations.json does not exist")

    run = read_files(short_run)
    assert run.headline("digits") == "top1"
    run.recipe.tasks["digits"] = Gone()  # type: ignore[assignment]
    assert run.headline("digits") == next(iter(run.results[0]["metrics"]["digits"]))
    run.recipe.tasks["new"] = Gone()  # type: ignore[assignment]
    assert run.headline("new") == "no metric"


def test_data_cannot_end_their_element() -> None:
    embedded = html.embedded("x", {"a": "</script><b>"})
    assert embedded.count("<") == 2
    assert json.loads(embedded.split(">", 1)[1].rsplit("<", 1)[0]) == {"a": "</script><b>"}


def test_routes_without_a_record_are_a_sentence() -> None:
    assert "one unit each" in routes_section(None)


def test_the_last_step_is_in_the_table_without_scripts(page: Path) -> None:
    assert f'<output id="route-shown">step {SHORT_STEPS}</output>' in page.read_text()
