"""Test a report in headless Chromium, opened from disk as a user does."""

import shutil

import pytest

from dwakd.report.report import write_report
from tests.report.builders import HOSTILE, RIGHT_TO_LEFT, comparison, similarity_file

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """Return the file of a report on a comparison whose answers contain scripts and right-to-left text."""
    folder = tmp_path_factory.mktemp("browser")
    out = comparison(
        trained, folder / "out", {"a": "sft", "b": HOSTILE, "c": "dskd"}, text=f" {HOSTILE} {RIGHT_TO_LEFT}"
    )
    similarity_file(out / "similarity.json", ["a", HOSTILE])
    write_report([out], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def opened(report):
    """Return a function that opens the report with given options of the browser; no error and no request may occur."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: on Debian, apt install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    faults = []

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(**options):
            context = browser.new_context(**options)
            context.route(
                lambda url: not url.startswith(("file:", "data:")),
                lambda route: (faults.append(route.request.url), route.abort()),
            )
            tab = context.new_page()
            tab.on("console", lambda message: faults.append(message.text))
            tab.on("pageerror", lambda error: faults.append(str(error)))
            tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
            tab.goto(report.as_uri())
            tab.wait_for_selector("html[data-charts]", state="attached")
            return tab

        yield open_page
        browser.close()
    assert faults == []


def test_charts_are_drawn(opened):
    """Every chart is drawn, in the width of its place."""
    tab = opened()
    figures = tab.locator("figure.chart")
    assert figures.count() > 10
    assert tab.locator("figure.chart svg").count() == figures.count()
    assert tab.get_attribute("html", "data-charts") == str(figures.count())
    assert all(figures.nth(k).locator("svg").bounding_box()["width"] > 200 for k in range(figures.count()))


def test_text_of_models_is_text(opened):
    """A script in an answer is shown as text and does not run; right-to-left text has its own direction."""
    tab = opened()
    assert tab.title() == "Distillation report"
    answer = tab.locator(".answer .data").first
    assert HOSTILE in answer.inner_text()
    assert RIGHT_TO_LEFT in answer.inner_text()
    assert answer.evaluate("one => getComputedStyle(one).unicodeBidi") == "plaintext"
    assert tab.locator("main img").count() == 0


def test_a_click_on_a_heading_sorts(opened):
    """Numbers are sorted as numbers, a second click reverses the order, and the heading says so."""
    tab = opened()
    tab.get_by_text("All scores").click()
    table = tab.locator("#section-2 table").last
    heading, column = (
        table.locator("th", has_text="value"),
        [name.strip() for name in table.locator("th").all_inner_texts()],
    )
    index = next(k for k, name in enumerate(column) if name.startswith("value"))
    for order, descending in (("ascending", False), ("descending", True)):
        heading.click()
        cells = table.locator(f"tbody td:nth-child({index + 1})").all()
        values = [float(cell.get_attribute("data-sort")) for cell in cells]
        assert values == sorted(values, reverse=descending)
        assert len(set(values)) > 1
        assert heading.get_attribute("aria-sort") == order


def test_a_search_hides_other_answers(opened):
    """Only the rows that contain all words of the search are shown, and their number."""
    tab = opened()
    box = tab.get_by_label("Search prompts and answers")
    box.fill("NUMBER 1. שלום")
    assert tab.locator(".search output").inner_text() == "1 of 3"
    assert tab.locator(".part:visible h3").inner_text().endswith("row 1")
    box.fill("")
    assert tab.locator(".part:visible").count() == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_switched(opened, scheme):
    """The colours of the page and of the charts change with the theme."""
    tab = opened(color_scheme=scheme)

    def colours():
        read = "one => getComputedStyle(one)"
        background = tab.locator("html").evaluate(f"{read}.backgroundColor")
        return background, tab.locator("figure.chart svg text").first.evaluate(f"{read}.fill")

    light, dark = ("rgb(255, 255, 255)", "rgb(28, 33, 40)"), ("rgb(20, 23, 28)", "rgb(227, 230, 234)")
    assert colours() == (dark if scheme == "dark" else light)
    tab.locator("#theme").click()
    assert colours() == (light if scheme == "dark" else dark)
    tab.emulate_media(media="print")
    assert colours()[0] == light[0]


def test_a_phone_needs_no_sideways_scrolling(opened):
    """On a phone, wide tables scroll within the page, and the page itself does not."""
    tab = opened(viewport={"width": 380, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == 380
