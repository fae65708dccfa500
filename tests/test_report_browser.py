"""The page as a person sees it: drawn by a real browser, from a file, without a network."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kompakt.report.page import render
from tests import result_factory as factory
from tests.test_report import CASES

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} is missing")


DRAWN = """[...document.querySelectorAll('.plot')].every((plot) => {
    const drawing = plot.querySelector('.main-svg');
    return drawing && plot.querySelector('.xtick') && Math.abs(drawing.clientWidth - plot.clientWidth) <= 1;
})"""


def until(page, condition: str, seconds: int = 30) -> None:
    """Wait for a condition. (``wait_for_function`` would evaluate it in the page, which the page's policy forbids.)"""
    for _ in range(20 * seconds):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not so after {seconds} s: {condition}")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def show(browser, tmp_path_factory):
    """Open the page of a case, once a scheme, at a width; what went wrong is in ``page.complaints``."""
    folder = tmp_path_factory.mktemp("pages")

    @cache
    def load(case: str, scheme: str):
        path = folder / f"{case}-{scheme}.html"
        path.write_text(render(CASES[case]()), encoding="utf-8")
        page = browser.new_context(color_scheme=scheme, offline=True).new_page()
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        return page

    def show(case: str = "usual", width: int = 1280, scheme: str = "light"):
        page = load(case, scheme)
        page.bring_to_front()  # a page in the background is not laid out anew
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media="screen")
        until(page, DRAWN)
        return page

    return show


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_is_quiet_and_drawn(show, case: str, width: int) -> None:
    page = show(case, width)
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    marks = page.evaluate(
        "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('.point').length)"
    )
    assert marks
    assert all(count >= 2 for count in marks)
    assert page.evaluate("window.pwned") is None


def test_plots_hold_a_mark_for_every_step_and_layer(show) -> None:
    page = show()
    count = "(name) => document.querySelectorAll(`#plot-${name} .point`).length"
    assert [page.evaluate(count, name) for name in ("accuracy", "size", "latency")] == [4, 4, 4]
    assert page.evaluate(count, "layers") == 6 * 22


@pytest.mark.parametrize("case", ["usual", "ten stages", "three layers"])
def test_labels_stay_inside_their_plot(show, case: str) -> None:
    page = show(case, 400)
    outside = page.evaluate(
        """[...document.querySelectorAll('.plot')].flatMap((plot) => {
             const box = plot.getBoundingClientRect();
             return [...plot.querySelectorAll('text')].filter((text) => {
               const at = text.getBoundingClientRect();
               return at.width && (at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1);
             }).map((text) => text.textContent);
           })"""
    )
    assert outside == []


def test_layers_sort_by_the_column_that_is_clicked(show) -> None:
    page = show()
    heads = page.locator("table[data-sortable] thead th")
    column = heads.all_text_contents().index("Params")
    rows = "[...document.querySelectorAll('table[data-sortable] tbody tr')]"
    values = f"{rows}.map((row) => Number(row.cells[{column}].dataset.value))"
    before = page.evaluate(values)
    heads.nth(column).locator("button").click()
    assert heads.nth(column).get_attribute("aria-sort") == "descending"
    assert page.evaluate(values) == sorted(before, reverse=True)
    heads.nth(column).locator("button").click()
    assert page.evaluate(values) == sorted(before)
    heads.nth(0).locator("button").click()
    assert page.evaluate(values) == before


def test_the_heading_stays_while_the_table_scrolls_in_its_own_box(show) -> None:
    page = show("400 layers", 400)
    top = "document.querySelector('table[data-sortable] thead th').getBoundingClientRect().top"
    page.evaluate("document.querySelector('.tall').scrollIntoView()")
    before = page.evaluate(top)
    page.evaluate("document.querySelector('.tall').scrollBy(300, 5000)")
    assert page.evaluate("document.querySelector('.tall').scrollTop") > 1000
    assert page.evaluate(top) == pytest.approx(before, abs=1)


def test_the_snippet_is_copied(show) -> None:
    page = show()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-copy=snippet]").click()
    until(page, "document.querySelector('[data-copy=snippet]').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == factory.SNIPPET


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_hold_their_contrast(show, scheme: str) -> None:
    page = show(scheme=scheme)
    style = """(names) => names.map((name) =>
        getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim())"""

    def colours(*names: str) -> list[str]:
        found = page.evaluate(style, list(names))
        return [f"#{''.join(2 * c for c in name[1:])}" if len(name) == 4 else name for name in found]

    grounds = colours("panel", "page", "wash")
    assert min(contrast(text, ground) for text in colours("ink", "soft") for ground in grounds) >= 4.5
    for text, ground in (("good", "good-wash"), ("bad", "bad-wash"), ("accent", "panel")):
        assert contrast(*colours(text, ground)) >= 4.5
    marks = page.evaluate(
        """[...document.querySelectorAll('.plot .point path, .plot path.point')]
             .map((mark) => mark.style.fill || mark.style.stroke)"""
    )
    solid = {tuple(map(int, m[4:-1].split(","))) for m in marks if m.startswith("rgb(")}
    assert len(solid) >= 4
    for red, green, blue in solid:
        assert contrast(f"#{red:02x}{green:02x}{blue:02x}", grounds[0]) >= 3
    shown = page.evaluate("getComputedStyle(document.querySelector('.plot .annotation text')).fill")
    expected = page.evaluate("getComputedStyle(document.body).color")
    assert shown == expected


def test_the_page_prints_whole_tables_and_plots_that_fit_the_paper(show) -> None:
    page = show("400 layers")
    widest = "Math.max(...[...document.querySelectorAll('.plot .main-svg')].map((drawing) => drawing.clientWidth))"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(widest) <= 640
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(widest) > 1000
    page.emulate_media(media="print")
    assert page.evaluate("(box => box.scrollHeight - box.clientHeight)(document.querySelector('.tall'))") <= 1
    assert page.evaluate("getComputedStyle(document.querySelector('.copy')).display") == "none"
