"""A site as EMBED.md tells to build it: pages with the tag, and a route that has the secret."""

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import plain
from running import Broker
from typing_extensions import override

AGENT = "A78WKV4515"

TIMEOUT = 20.0
"""Seconds that the broker may take to answer the site."""

CORS = {"access-control-allow-origin": "*"}


class Answer(NamedTuple):
    """An answer that is ready."""

    body: str | bytes
    headers: Mapping[str, str] = {}
    status: int = 200


class Website(ThreadingHTTPServer):
    """The site on `localhost`: for a browser another site than the broker on 127.0.0.1.

    `pages` are answered as they are; `asked` are the bodies of all requests for a token;
    `prepared` answers come first, then those of the broker.
    """

    daemon_threads = True

    def __init__(self, broker: Broker) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.broker = broker
        self.pages: dict[str, Answer] = {}
        self.asked: list[dict[str, Any]] = []
        self.prepared: list[Answer] = []
        self.sessions: list[str] = []

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let a browser leave while it is answered; everything else is a failure to be seen."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Its origin."""
        return f"http://localhost:{self.server_address[1]}"

    @property
    def embed_origin(self) -> str:
        """Where the frame begins; it redirects."""
        return self.broker.url

    @property
    def viewer_origin(self) -> str:
        """Where the frame ends up."""
        return f"http://viewer.localhost:{urlsplit(self.broker.url).port}"

    def tag(self, **attributes: str) -> str:
        """Return the tag; attributes by their names in Python (`token_url`), "" leaves one out."""
        given = {
            "agent": AGENT,
            "token_url": "/avatar-token",
            "embed_origin": self.embed_origin,
            "viewer_origins": self.viewer_origin,
            **attributes,
        }
        src = given.pop("src", f"{self.broker.url}/embed.js")
        written = " ".join(
            f'data-{name.replace("_", "-")}="{value}"' for name, value in given.items() if value
        )
        return f'<script async src="{src}" {written}></script>'

    def show(self, content: str, headers: Mapping[str, str] | None = None, path: str = "/") -> str:
        """Publish a page; returns its URL."""
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A site</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"></head><body>{content}</body></html>'
        )
        self.pages[path] = Answer(page, {"Content-Type": "text/html", **(headers or {})})
        return f"{self.url}{path}"

    def avatar_token(self, body: bytes) -> Answer:
        """Answer the site's page: what the snippets of BACKENDS.md do."""
        self.asked.append(json.loads(body))
        if self.prepared:
            return self.prepared.pop(0)
        got = plain.post(
            self.broker.token_url,
            content=body,
            headers={"api-secret": self.broker.secret},
            timeout=TIMEOUT,
        )
        if got.is_success:
            self.sessions.append(got.json()["data"]["session_id"])
        kept = {"Retry-After": got.headers.get("Retry-After", ""), "Cache-Control": "no-store"}
        kept["Content-Type"] = "application/json"
        return Answer(got.content, {n: v for n, v in kept.items() if v}, got.status_code)


class _Exchange(BaseHTTPRequestHandler):
    server: Website
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(self.server.pages.get(urlsplit(self.path).path, Answer("", {}, 404)))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/avatar-token":
            self._answer(self.server.avatar_token(body))
            return
        # everything else is passed on as it is: a broker that was put under the site's own origin
        kept = ("api-secret", "content-type", "origin")
        headers = {name: value for name, value in self.headers.items() if name.lower() in kept}
        got = plain.post(f"{self.server.broker.url}{self.path}", content=body, headers=headers)
        self._answer(Answer(got.content, {"Content-Type": "application/json"}, got.status_code))

    def _answer(self, answer: Answer) -> None:
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def website(broker: Broker) -> Iterator[Website]:
    """Run a site in front of this broker."""
    with Website(broker) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()


def refusal(status: int, code: str, retry_after: int | None = None) -> Answer:
    """Return a failure as the broker words it."""
    body = {
        "success": False,
        "status": "error",
        "status_code": status,
        "error": {"code": code, "message": "prepared", "httpStatus": status},
    }
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Answer(json.dumps(body), {"Content-Type": "application/json", **headers}, status)


def token_answer(token: str, expires_at: int) -> Answer:
    """Return a token as the broker hands it out."""
    data = {"token": token, "session_id": "prepared", "sid": "prepared", "expires_at": expires_at}
    return Answer(json.dumps({"success": True, "data": data}), {"Content-Type": "application/json"})
