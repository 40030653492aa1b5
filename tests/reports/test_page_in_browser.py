"""The page in Chromium: wide and narrow, light and dark, with code and without."""

import json

import numpy as np
import pytest
from PIL import Image

from clafusion.reports.page import write_report
from tests.support.browser import Browser, find_chromium
from tests.support.pair_results import FAILED, accuracies_of, pair_results, task_results

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium (Debian's package chromium) on PATH"
)

NAMES = ["small", "wide", "<script>problem()</script>", "a-name-that-is-quite-long-seed-17", "mlp"]

# Sections without a height, and texts that are cut off or stick out.
FAULTS = """(() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide) found.push("the page is scrolled sideways");
  for (const one of document.querySelectorAll("section, article, table, svg, .tiles li")) {
    const box = one.getBoundingClientRect();
    if (getComputedStyle(one).display === "none" || one.closest("details:not([open])")) continue;
    if (one.checkVisibility && !one.checkVisibility()) continue;
    if (box.height < 8 || box.width < 8) found.push(`empty: ${one.outerHTML.slice(0, 80)}`);
    if (box.right > wide + 1 && !one.closest(".scroll, .drawing"))
      found.push(`sticks out: ${one.outerHTML.slice(0, 80)}`);
  }
  return found;
})()"""

# The least contrast of text with what is behind it, as WCAG 2 defines it.
CONTRAST = """(() => {
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  let least = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || one.closest("svg, script, style")) continue;
    if (!one.checkVisibility()) continue;
    let behind = one;
    while (behind && (parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0)
      behind = behind.parentElement;
    const back = light(parts(getComputedStyle(behind ?? document.body).backgroundColor));
    const front = light(parts(getComputedStyle(one).color));
    const found = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    if (found < least[0]) least = [found, one.outerHTML.slice(0, 100)];
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    failed = {("small", "mlp"): FAILED["unlike"].format("small", "mlp")}
    results = pair_results(NAMES, failed=failed)
    run = {"command": "clafusion fuse-pairs zoo.yaml --jobs 2", "data": "images.npy"}
    write_report(results, path, run=run, accuracies=accuracies_of(results), tasks=task_results())
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(find_chromium(), tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)]
)
def test_nothing_is_empty_cut_off_or_hard_to_read(browser, page, width, dark, tmp_path):
    browser.show(page, width, dark=dark)
    assert browser.run(FAULTS) == []
    least, where = browser.run(CONTRAST)
    assert least >= 4.5, where
    browser.picture(tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L"), dtype=float)
    assert pixels.shape[1] == width
    assert (pixels.mean() < 100) == dark
    # No part of the page of half a window's height is blank.
    blank = np.ptp(pixels, axis=1) < 8
    longest = max(map(len, "".join("x" if one else " " for one in blank).split()), default=0)
    assert longest < 300
    assert browser.problems == []
    assert set(browser.requests) == {page.resolve().as_uri()[:100]}


def rows(browser):
    code = """JSON.stringify([...document.querySelectorAll("#board-table tbody tr")]
      .filter((row) => !row.hidden).map((row) => [...row.cells].map((one) => one.textContent)))"""
    return json.loads(browser.run(code))


def test_the_table_is_sorted_and_filtered(browser, page):
    browser.show(page, 1280)
    head = "[...document.querySelectorAll('#board-table thead th')]"
    titles = browser.run(f"{head}.map((one) => one.textContent)")
    column = titles.index("seconds")
    for order in ("descending", "ascending"):
        browser.run(f"{head}[{column}].querySelector('button').click()")
        assert browser.run(f"{head}[{column}].getAttribute('aria-sort')") == order
        seconds = [float(one[column]) for one in rows(browser)]
        assert seconds == sorted(seconds, reverse=order == "descending")
        assert len(seconds) == 9
    browser.run("const filter = document.getElementById('filter'); filter.value = 'WIDE mlp';"
                "filter.dispatchEvent(new Event('input'))")  # fmt: skip
    assert [one[:2] for one in rows(browser)] == [["wide", "mlp"]]
    assert browser.run("document.querySelector('.tools .note').textContent") == (
        "1 of 9 pairs shown"
    )


@pytest.mark.parametrize("target", ["#board-table tr", ".heat td", ".scatter circle"])
def test_any_pair_opens_on_click(browser, page, target):
    browser.show(page, 1280)
    place = browser.run("Object.keys(JSON.parse(document.getElementById('data').textContent).pairs)"
                        ".find((one) => !document.getElementById(`pair-${one}`))")  # fmt: skip
    click = "dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    browser.run(f"document.querySelector('{target}[data-p=\"{place}\"]').{click}")
    browser.run("new Promise((done) => setTimeout(done, 50))")
    names = browser.run(f"JSON.parse(document.getElementById('data').textContent).pairs[{place}]"
                        ".names.join(' and ')")  # fmt: skip
    assert browser.run("document.querySelector('#opened h3').textContent") == names
    assert browser.run("document.querySelectorAll('#opened svg').length") == 2
    assert browser.run("document.activeElement === document.querySelector('#opened article')")
    assert browser.run(FAULTS) == []
    assert browser.problems == []


def test_a_switch_shows_another_map_and_the_page_needs_no_code(browser, page, tmp_path):
    browser.show(page, 1280)
    shown = "[...document.querySelectorAll('.map')].map((one) => one.checkVisibility())"
    assert browser.run(shown).index(True) == 0
    for i in range(len(browser.run(shown))):
        browser.run(f"document.querySelectorAll('.maps > label')[{i}].click()")
        assert [j for j, one in enumerate(browser.run(shown)) if one] == [i]
    browser.show(page, 1280, script=False)
    browser.picture(tmp_path / "page.png")
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert not browser.run("document.documentElement.classList.contains('scripted')")
    assert browser.run("document.querySelectorAll('.drawing svg').length") == 0
    assert len(rows(browser)) == 9


def test_a_page_of_merges_alone_is_whole_and_sorted(browser, tmp_path):
    write_report([], tmp_path / "tasks.html", tasks=task_results())
    for width in (1280, 390):
        browser.show(tmp_path / "tasks.html", width)
        assert browser.run(FAULTS) == []
    column = "document.querySelectorAll('#merges thead th')[0]"
    browser.run(f"{column}.querySelector('button').click()")
    assert browser.run(
        "[...document.querySelectorAll('#merges tbody th')].map((one) => one.textContent)"
    ) == ["both <b>", "lost", "no data"]
    assert browser.problems == []
