"""The example as somebody new starts it: one line in a clone, then a browser."""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import plain
import pytest
from browsing import Visit
from playwright.sync_api import Browser, expect
from running import START, until

pytestmark = pytest.mark.parts

ROOT = Path(__file__).parents[2]

INSTALL = 300.0
"""Seconds in which the packages are there, the first time."""


IN_A_SCRIPT = """trap '' INT; exec "$0" "$@" """
"""Starts a command as a script's `command &` does: SIGINT is ignored, as for all that it starts."""


class Example:
    """`config/example/run`, and what it wrote so far."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", IN_A_SCRIPT, ROOT / "config" / "example" / "run", "--any-port"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def found(self, pattern: str, timeout: float = START) -> str:
        """Wait for a line, and return its first group."""
        until(lambda: re.search(pattern, self.output), f"{pattern!r} in {self.output}", timeout)
        match = re.search(pattern, self.output)
        assert match is not None
        return match[1]

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def close(self) -> None:
        """End it, however far it came."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(START)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def example() -> Iterator[Example]:
    """Start it."""
    running = Example()
    try:
        yield running
    finally:
        running.close()


def test_one_line_shows_it_all(example: Example, browser: Browser) -> None:
    """The page's button opens the frame with a token of the fake vendor; Ctrl-C ends all parts."""
    shop = example.found(r"Open (http://127\.0\.0\.1:\d+/) ", INSTALL)
    control = example.found(r"curl -s (http://\S+/_control/fault)")
    visitor = Visit(browser)
    page = visitor.page
    page.goto(shop)
    page.get_by_role("button", name="Ask our guide").click()
    viewer = page.frame_locator("iframe")
    expect(viewer.locator("#agent")).to_have_text("A78WKV4515")
    expect(viewer.locator("#session")).not_to_have_text("…")
    assert visitor.complaints == []
    visitor.close()
    assert "minted     A78WKV4515 dev" in example.output
    assert re.search(
        r"vendor \| POST   /v1/embed-tokens/request  200  [0-9.]+ ms\n", example.output
    )

    def request_token() -> int:
        body = {"fingerprint": os.urandom(8).hex()}
        return plain.post(f"{shop}avatar-token", json=body, timeout=START).status_code

    assert request_token() == 200
    told = plain.post(control, content=json.dumps({"fault": "refuse=PLAN_REQUIRED"})).json()
    assert [fault["fault"] for fault in told["set"]] == ["403 PLAN_REQUIRED"]
    assert request_token() == 403
    ports = {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", example.output)}
    example.process.send_signal(signal.SIGINT)
    assert example.process.wait(START) == 0
    for port in ports:
        with pytest.raises(httpx.ConnectError):
            plain.get(f"http://127.0.0.1:{port}/")
    example._reader.join()
    assert "Traceback" not in example.output
