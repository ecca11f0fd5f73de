"""How large the HTML page of a report is, and how long headless Chromium takes to open it and lay it out.

python tests/benchmarks/html_report.py; it needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from selenium import webdriver

from gradctl.report.html.page import render
from tests.report.examples import many
from tests.report.html.pages import everything, ladder, with_evidence

_MOST_SECONDS = 2.0
_REPEATS = 5


def opened(browser: webdriver.Chrome, file: Path) -> float:
    """Return the seconds until a page is laid out, from the start of its navigation."""
    browser.get(file.as_uri())
    browser.execute_script("return document.body.getBoundingClientRect().height")
    return float(browser.execute_script("return performance.now()")) / 1000


def main() -> None:
    """Print a row for each page."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(argument)
    reports = {
        "one of everything": everything(),
        "500 units of 40 tensors": with_evidence(many(500, 40), ladder(1.0)),
        "5000 units of 40 tensors": with_evidence(many(5000, 40), ladder(1.0)),
    }
    print(f"{'report':<28}{'render':>10}{'bytes':>12}{'open and lay out (median)':>28}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory() as folder, webdriver.Chrome(options=options, service=service) as browser:
        opened(browser, Path("/"))  # the first page starts what the others find
        for name, report in reports.items():
            start = time.perf_counter()
            text = render(report)
            seconds = time.perf_counter() - start
            file = Path(folder) / "report.html"
            file.write_text(text, encoding="utf-8")
            taken = sorted(opened(browser, file) for _ in range(_REPEATS))[_REPEATS // 2]
            limit = f"  (at most {_MOST_SECONDS:.0f} s)" if name.startswith("500 ") else ""
            print(f"{name:<28}{seconds:>8.2f} s{len(text.encode()):>12}{taken:>26.2f} s{limit}")


if __name__ == "__main__":
    main()
