"""The report in a real browser: no errors, working filters, nothing wider than a phone."""

from __future__ import annotations

import os
import shutil

import pytest
from synthetic import write_run

from fedlora_app.report.page import write_comparison, write_report

playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.getenv("FEDLORA_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
PHONE, DESK = 400, 1200

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"
    ),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    question = "What does <b>rule {}</b> of the averyveryveryverylongword" + "long" * 30 + " say?"
    runs = [
        write_run(folder / "pair", num_conflicts=20, question=question, right=0.8),
        write_run(folder / "one", num_conflicts=20, question=question, mode="fedavg", right=0.3),
    ]
    pages = [write_report(run) for run in runs]
    unfinished = write_report(write_run(folder / "bare", evaluated=False))
    return [*pages, unfinished, write_comparison(runs, folder / "report.html")]


@pytest.fixture
def open_page(browser):
    complaints: list[str] = []
    fetched: list[str] = []

    def open_(path, width=DESK, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    assert complaints == []
    assert all(url.startswith("file://") for url in fetched), fetched


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_screen(open_page, reports, number, width):
    page = open_page(reports[number], width)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What scrolls inside itself may be wider; everything else stays on the screen.
    wider = page.evaluate(
        """(width) => [...document.querySelectorAll('body *')].filter((e) =>
        !e.closest('.scroll') && !e.closest('svg') && e.getClientRects().length
        && e.getBoundingClientRect().right > width + 1)
        .map((e) => e.tagName + '.' + e.className)""",
        width,
    )
    assert wider == []


def test_the_filters_show_what_they_say(open_page, reports):
    page = open_page(reports[0])
    total = page.locator("#questions article").count()
    visible = page.locator("#questions article:visible")
    assert total == 20 and visible.count() == total
    page.select_option("[name=status]", "failed")
    failed = visible.count()
    assert 0 < failed < total and page.inner_text("#count") == f"{failed} of {total} questions"
    page.select_option("[name=status]", "passed")
    assert visible.count() == total - failed
    page.select_option("[name=client]", "client-01")
    rows = page.locator("#questions article:visible tbody tr:visible")
    assert set(rows.evaluate_all("rows => rows.map((row) => row.dataset.client)")) == {"client-01"}
    assert set(rows.evaluate_all("rows => rows.map((row) => row.className)")) == {"passed"}
    page.select_option("[name=status]", "failed")
    assert set(rows.evaluate_all("rows => rows.map((row) => row.className)")) == {"failed"}
    page.select_option("[name=status]", "")
    page.select_option("[name=client]", "")
    page.fill("[name=text]", "RULE 13")
    assert visible.count() == 1 and "<b>rule 13</b>" in visible.first.text_content()
    page.fill("[name=text]", "no such words")
    assert visible.count() == 0 and page.inner_text("#count") == "0 of 20 questions"


def test_both_themes_are_readable(open_page, reports):
    def contrast(page, selector):
        return page.evaluate(
            """(selector) => {
            const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
            const light = (colour) => {
              const [r, g, b] = colour.match(/[0-9.]+/g).map((v) => linear(v / 255));
              return .2126 * r + .7152 * g + .0722 * b; };
            const element = document.querySelector(selector);
            const style = getComputedStyle(element);
            const ink = element instanceof SVGElement ? style.fill : style.color;
            const [a, b] = [light(ink),
              light(getComputedStyle(document.documentElement).backgroundColor)];
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }""",
            selector,
        )

    papers = set()
    for scheme in ("light", "dark"):
        page = open_page(reports[0], scheme=scheme)
        papers.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        for selector in (".lead", ".note", "td b", "nav a", ".best b", "figure svg text"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
    assert len(papers) == 2


def test_the_verdict_stands_on_the_first_screen(open_page, reports):
    for width in (PHONE, DESK):
        page = open_page(reports[0], width)
        for selector in ("h1", ".lead", "table.figures"):
            assert page.locator(selector).bounding_box()["y"] < 900


def test_a_printed_page_leaves_nothing_out(open_page, reports):
    page = open_page(reports[0])
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator(".filter").is_visible()
    assert page.locator("#questions article:visible").count() == 20
    assert len(page.pdf()) > 50_000
