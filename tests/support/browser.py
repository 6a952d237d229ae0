"""A real Chromium for tests, and a page that collects its errors.

It needs the extra `browser` (playwright, for its driver alone) and a Chromium: one of the system
(`apt-get install chromium`), or playwright's own (`playwright install chromium`).
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = (1200, 800), (400, 800)  # pixels


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; the test fails if there is none."""
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.fail(f"expected a Chromium, got none of {', '.join(NAMES)}; apt-get install chromium brings one")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page and its errors so far."""

    def __init__(self, browser: Browser, address: str, *, size: tuple[int, int] = WIDE, dark: bool = False) -> None:
        self.faults: list[str] = []  # what the console says, exceptions, and requests that leave `address`
        width, height = size
        scheme = "dark" if dark else "light"
        self.page: Page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        self.page.on("request", lambda request: self._see(request.url, address))
        self.page.goto(address)

    def _see(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:")):
            self.faults.append(f"asks for {url}")

    def overflows(self) -> int:
        """By how many pixels the page is wider than its window."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return found
