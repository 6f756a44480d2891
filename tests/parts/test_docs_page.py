"""The interactive document in a real browser: a token by hand, and nothing from elsewhere."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from browsing import Visit
from playwright.sync_api import Browser, expect
from running import Broker, broker

pytestmark = pytest.mark.parts


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run one development broker."""
    with broker(tmp_path_factory.mktemp("broker")) as started:
        yield started


def test_the_documents_form_mints_a_token(
    running: Broker, browser: Browser, tmp_path: Path
) -> None:
    """Authorize with the secret, execute the prepared example: a token; nobody else is asked."""
    visit = Visit(browser)
    page = visit.page
    page.goto(f"{running.url}/docs")
    page.get_by_role("button", name="Authorize").first.click()
    secret = page.locator(".auth-container", has_text="api-secret")
    secret.locator("input").fill(running.secret)
    secret.get_by_role("button", name="Apply credentials").click()
    secret.get_by_role("button", name="Close", exact=True).click()

    operation = page.locator("#operations-default-requestEmbedToken")
    operation.get_by_role("button").first.click()
    prepared = json.loads(operation.locator("textarea").input_value())
    assert prepared.keys() == {"agent_id", "fingerprint"}
    operation.get_by_role("button", name="Execute").click()
    live = operation.locator(".live-responses-table")
    expect(live.locator("tbody .response-col_status").first).to_contain_text("200")
    body = live.locator(".highlight-code code").first
    answer = json.loads(body.inner_text())
    page.screenshot(path=tmp_path / "docs.png")

    assert answer["success"] is True
    assert answer["data"]["token"].count(".") == 2
    assert visit.foreign(running.url) == []
    assert f"{running.url}/v1/embed-tokens/request" in visit.requests
    assert visit.complaints == []


def test_the_index_leads_to_pages_that_work(running: Broker, browser: Browser) -> None:
    """Each link of the development index answers, and the index asks for nothing else."""
    visit = Visit(browser)
    visit.page.goto(running.url)
    links = visit.page.locator("a").evaluate_all("links => links.map(link => link.href)")
    assert {link.removeprefix(running.url) for link in links} >= {"/docs", "/metrics", "/livez"}
    for link in links:
        answer = visit.page.request.get(link)
        assert answer.ok, link
    assert visit.foreign(running.url) == []
    assert visit.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_index_can_be_read(
    running: Broker, browser: Browser, scheme: Literal["light", "dark"]
) -> None:
    """Text and links stand out from what is behind them (WCAG 2.2 AA), in the dark too."""
    visit = Visit(browser, scheme=scheme)
    visit.page.goto(running.url)
    behind, *inks = visit.page.evaluate(
        """() => [
          getComputedStyle(document.documentElement).backgroundColor,
          ...Array.from(document.querySelectorAll("h1, p, li, code, a"),
            (element) => getComputedStyle(element).color),
        ]"""
    )
    assert "rgba" not in behind, "what shows through is the browser's, and no one's to measure"
    assert (luminance(behind) < 0.5) == (scheme == "dark")
    assert len(inks) > 10
    for ink in set(inks):
        low, high = sorted((luminance(behind), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (behind, ink)
    visit.close()


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(R, G, B)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
