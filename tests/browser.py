"""A headless Chromium that notes every request, for the tests that look at pages as users do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Seen:
    """A page, and the addresses of all it asked for."""

    page: Page
    requests: list[str] = field(default_factory=list)

    def outside(self, *allowed: str) -> list[str]:
        """Requests to anywhere else than what begins so; what a page carries in itself is no request."""
        return [url for url in self.requests if not url.startswith((*allowed, "data:", "blob:"))]


@contextmanager
def chromium() -> Iterator[Seen]:
    """A browser's page; the test is skipped where there is no browser."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser here: install one of {', '.join(NAMES)} (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1100})
            seen = Seen(page)
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on("websocket", lambda socket: seen.requests.append(socket.url))
            yield seen
        finally:
            browser.close()
