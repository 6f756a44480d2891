"""Debian's Chromium, without a screen and with a microphone that hums."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from running import START

expect.set_options(timeout=START * 1000)  # a busy machine is late; what never comes fails

FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",  # a microphone that beeps once a second
    "--use-fake-ui-for-media-stream",  # and a visitor who lets every page use it
]
"""No errands of its own, which have nothing to do with the page."""

CHROMIUM = {"executable_path": "/usr/bin/chromium", "chromium_sandbox": False}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser; each `Visit` of it is somebody else."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def without_foreign_cookies(browser: Browser, profile: Path) -> Iterator[BrowserContext]:
    """Run another browser, whose owner blocks third-party cookies, as Safari does for all."""
    preferences = {"profile": {"cookie_controls_mode": 1, "block_third_party_cookies": True}}
    (profile / "Default").mkdir(parents=True)
    (profile / "Default" / "Preferences").write_text(json.dumps(preferences), encoding="utf-8")
    context = browser.browser_type.launch_persistent_context(profile, **CHROMIUM, args=FLAGS)
    try:
        yield context
    finally:
        context.close()


class Visit:
    """One visitor's browser: a page, and what it asked for and complained about."""

    def __init__(
        self,
        browser: Browser | BrowserContext,
        size: tuple[int, int] = (1200, 900),
        scheme: str = "light",
    ) -> None:
        if isinstance(browser, Browser):
            viewport = {"width": size[0], "height": size[1]}
            browser = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.context = browser
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = self.tab()

    def tab(self) -> Page:
        """Open another tab of the same visitor."""
        page = self.context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        return page

    def foreign(self, *urls: str) -> list[str]:
        """Return what was asked of anybody but `urls`."""
        own = (*(f"{url}/" for url in urls), "data:")
        return [asked for asked in self.requests if not asked.startswith(own)]

    def close(self) -> None:
        """Leave."""
        self.context.close()
