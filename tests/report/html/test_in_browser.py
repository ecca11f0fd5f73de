"""The HTML report in headless Chromium: no error, no overflow, no fault of accessibility, at the width of a phone too.

It needs Chromium, its driver and selenium; the tests of accessibility also axe-core: npm ci in this folder.
"""

from __future__ import annotations

import base64
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from gradctl.check_report import CheckReport
from gradctl.report.html.page import render
from tests.report import examples
from tests.report.html.pages import everything, optimized, two_graphs

AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
WIDTHS = (360, 1280)


def why_without_browser():
    """Return why no page can be opened, or nothing."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    return f"not installed: {', '.join(missing)}" if missing else ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_without_browser()), reason=why_without_browser())]


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):  # root has no sandbox
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(everything()), encoding="utf-8")
    return file


def opened(browser, file, width=1280, scheme="light"):
    """Open a page at a width, in a colour scheme, with all folds open."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(file.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    return browser


@pytest.mark.parametrize("width", WIDTHS)
def test_no_error_is_logged_and_nothing_is_wider_than_the_window(browser, page, width):
    opened(browser, page, width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = """
        return [...document.querySelectorAll("body *")].filter((each) =>
            each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".scroll, pre")
        ).map((each) => each.outerHTML.slice(0, 200));
    """
    assert browser.execute_script(beyond) == []


@pytest.mark.skipif(not AXE.exists(), reason=f"axe-core is not installed: npm ci in {AXE.parents[2]}")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_serious_fault(browser, page, width, scheme):
    opened(browser, page, width, scheme)
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
    faults = [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]
    assert faults == []


def test_a_fault_that_is_planted_is_found(browser, page, tmp_path):
    if not AXE.exists():
        pytest.skip(f"axe-core is not installed: npm ci in {AXE.parents[2]}")
    file = tmp_path / "faulty.html"
    text = page.read_text(encoding="utf-8").replace("<h1", '<p style="color:#eee">pale</p><img src=""><h1')
    file.write_text(text, encoding="utf-8")
    opened(browser, file, 1280)
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = {each["id"] for each in browser.execute_async_script("axe.run().then(arguments[0])")["violations"]}
    assert {"image-alt", "color-contrast"} <= found


@pytest.mark.parametrize("report", [two_graphs(), optimized()], ids=["compare", "optimize"])
def test_a_node_says_what_it_is_if_it_is_reached_by_keyboard_and_its_match_is_marked(browser, tmp_path, report):
    from selenium.webdriver.common.keys import Keys

    file = tmp_path / "graph.html"
    file.write_text(render(report), encoding="utf-8")
    opened(browser, file)
    browser.execute_script("document.querySelector('.graph .scroll').focus()")
    browser.switch_to.active_element.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.get_attribute("aria-label").startswith("before: Mul n0 (unchanged)")
    details = browser.find_element("css selector", ".graph .details")
    assert details.text == first.get_attribute("aria-label")
    assert browser.find_element("css selector", ".twin").get_attribute("aria-label").startswith("after: Mul n0")
    first.send_keys(Keys.TAB)
    assert details.text == "before: Neg n1 (removed); axis = 1; inputs: v0; output: v1"


def test_matched_nodes_are_at_one_height(browser, tmp_path):
    file = tmp_path / "graph.html"
    file.write_text(render(two_graphs()), encoding="utf-8")
    opened(browser, file)
    heights = browser.execute_script("""
        return [...document.querySelectorAll(".node")].filter((each) => each.dataset.twin).map((each) => [
            each.getBoundingClientRect().top, document.getElementById(each.dataset.twin).getBoundingClientRect().top]);
    """)
    assert len(heights) == 4
    assert all(one == other for one, other in heights)


def test_on_paper_every_fold_is_open(browser, page):
    opened(browser, page)
    browser.get(page.as_uri())  # folds as they are
    closed = "return [...document.querySelectorAll('details')].filter((each) => !each.open).length"
    assert browser.execute_script(closed) > 0
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert browser.execute_script(closed) == 0  # by the event before printing
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 3


def test_a_link_to_a_folded_unit_opens_it(browser, page):
    browser.get(page.as_uri())
    browser.execute_script("document.querySelector('details.unit').open = false")
    key = browser.execute_script("return document.querySelector('details.unit > div').id")
    browser.find_element("css selector", f"a[href='#{key}']").click()
    assert browser.execute_script(f"return document.getElementById('{key}').closest('details').open")


def test_text_that_would_be_a_script_does_not_run(browser, tmp_path):
    name = "x<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"' onfocus=window.ran=1 autofocus "
    file = tmp_path / "report.html"
    tensors = [examples.gradient(name, "reference-wrong", error=0.5, budget=1e-7)]
    file.write_text(render(examples.report_of(examples.unit("fail", tensors, target=name))), encoding="utf-8")
    opened(browser, file)
    assert browser.execute_script("return window.ran") is None
    assert browser.get_log("browser") == []


def test_a_notebook_keeps_its_own_styles(browser, tmp_path):
    file = tmp_path / "notebook.html"
    own = "<!doctype html><title>notebook</title><style>h1 { color: rgb(1, 2, 3) }</style><h1>mine</h1>"
    file.write_text(own + CheckReport.of(everything())._repr_html_(), encoding="utf-8")
    browser.get(file.as_uri())
    colour = "return getComputedStyle(document.querySelector('h1')).color"
    assert browser.execute_script(colour) == "rgb(1, 2, 3)"
    browser.switch_to.frame(0)
    assert browser.execute_script(colour) != "rgb(1, 2, 3)"
    assert browser.execute_script("return document.querySelectorAll('svg').length") > 5
    browser.switch_to.default_content()
    assert browser.get_log("browser") == []
