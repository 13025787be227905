"""A real browser for tests of the page of `metis-fast view`: Debian's chromium, driven by selenium."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = (
    ""
    if CHROMIUM and DRIVER and importlib.util.find_spec("selenium")
    else "needs selenium, chromium and its driver (.ci/browser)"
)
LIMIT_S = 90.0
ENTER, ESCAPE, RIGHT = "\ue007", "\ue00c", "\ue014"  # as WebDriver names keys
_AXE = importlib.util.find_spec("axe_playwright_python")  # of which only axe's own script is used
NO_AXE = "" if _AXE else "needs axe-core (pip install --no-deps axe-playwright-python)"


@contextmanager
def browser() -> Iterator[Any]:
    """A driver of a browser without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.base = url.partition("?")[0].partition("#")[0]
        self.open(url)

    def script(self, text: str, *arguments: object) -> Any:
        return self.driver.execute_script(text, *arguments)

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while not (found := holds()):
            assert time.monotonic() < deadline, f"{what}; the page says: {self.text[:1000]}"
            time.sleep(0.05)
        return found

    def settle(self) -> None:
        """Until what the address asks for is shown."""
        shown = (
            "const main = document.getElementById('content');"
            "return main && !main.hasAttribute('aria-busy') && (main.dataset.hash ?? '') === location.hash"
        )
        self.until(lambda: self.script(shown), "the page does not settle")

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.settle()

    def to(self, page: str) -> None:
        """page: what stands behind the #."""
        self.script("location.hash = arguments[0]", f"#/{page}")
        self.settle()

    @property
    def at(self) -> str:
        return self.script("return decodeURIComponent(location.hash)")

    @property
    def text(self) -> str:
        return self.script("return document.getElementById('content').innerText")

    @property
    def heading(self) -> str:
        return self.script("return document.querySelector('h1').textContent")

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def texts(self, css: str) -> list[str]:
        """Of what is displayed, at one moment: the page may draw itself anew."""
        found = (
            "return [...document.querySelectorAll(arguments[0])].filter((one) => one.offsetParent).map((one) => one.innerText)"
        )
        return self.script(found, css)

    def press(self, *keys: str) -> None:
        self.script("document.activeElement.blur()")
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)
        time.sleep(0.1)
        self.settle()

    def choose(self, name: str, value: str) -> None:
        """In the filters."""
        field = self.one(f".filters [name={name}]")
        text = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"
        self.script(text, field, value)
        self.until(lambda: f"{name}=" in self.at if value else f"{name}=" not in self.at, f"{name} is not in the address")
        self.settle()

    @property
    def total(self) -> int:
        words = self.one(".pages [role=status]").text.split()
        return 0 if words[0] == "None" else int(words[words.index("of") + 1])

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        time.sleep(0.3)

    def dark(self, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def complaints(self) -> list[str]:
        """Of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def problems(self) -> list[str]:
        """What axe finds serious or critical: rule, element, and what is wrong with it."""
        assert _AXE is not None and _AXE.submodule_search_locations
        if not self.script("return Boolean(window.axe)"):
            self.script(Path(_AXE.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then((all) => done(all.violations))"
        )
        return [
            f"{one['id']}: {' '.join(node['target'])}: {' '.join(node['failureSummary'].split())}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]
