"""The shop: a page with the tag, and the one route of a backend that has the client secret.

Nothing but the standard library; `broker/web/BACKENDS.md` has the route for frameworks.
"""

import http.client
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import urlsplit

AGENT = "A78WKV4515"
"""The avatar of this shop: the page does not choose it."""

MAX_BODY = 8 * 1024
"""Bytes: a page sends a fingerprint."""

TIMEOUT = 15
"""Seconds; longer than the broker's own deadline, whose answer should be seen."""

KEPT = ("Content-Type", "Cache-Control", "Retry-After")
"""What the page is told of the broker's answer."""


class Broker(NamedTuple):
    """Where the broker is, and what this shop is known by there."""

    url: str
    secret: str


class Shop(ThreadingHTTPServer):
    """Serves the shop; `port` 0 is any free one."""

    daemon_threads = True

    def __init__(self, port: int, broker: Broker) -> None:
        super().__init__(("127.0.0.1", port), _Exchange)
        self.broker = broker
        broker_port = urlsplit(broker.url).port
        page = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
        self.page = Template(page).substitute(
            broker=broker.url,
            # without these the frame would be the vendor's, which refuses a fake vendor's tokens
            embed=f"http://localhost:{broker_port}",
            viewer=f"http://viewer.localhost:{broker_port}",
        )

    @property
    def url(self) -> str:
        """Where to look at it."""
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Exchange(BaseHTTPRequestHandler):
    server: Shop
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Show the page."""
        if self.path != "/":
            self._answer(404, b"", {})
            return
        self._answer(200, self.server.page.encode(), {"Content-Type": "text/html; charset=utf-8"})

    def do_POST(self) -> None:
        """Ask the broker for a visitor's token."""
        body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), MAX_BODY))
        if self.path != "/avatar-token":
            self._answer(404, b"", {})
            return
        try:
            fingerprint = json.loads(body)["fingerprint"]
        except (ValueError, TypeError, KeyError):
            self._answer(400, b"", {})
            return
        self._answer(*self._token(fingerprint))

    def _token(self, fingerprint: object) -> tuple[int, bytes, dict[str, str]]:
        url, secret = self.server.broker
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
        try:
            connection.request(
                "POST",
                "/v1/embed-tokens/request",
                json.dumps({"agent_id": AGENT, "fingerprint": fingerprint}),
                {"api-secret": secret},
            )
            answer = connection.getresponse()
            headers = {name: answer.headers[name] for name in KEPT if name in answer.headers}
            return answer.status, answer.read(), headers
        except OSError:
            return 502, b"", {"Retry-After": "2"}
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
        """Write one line for a request."""
        print("shop   |", format % args, flush=True)
