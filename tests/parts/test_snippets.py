"""The routes of the page, each run as it stands by its own runtime: what asks for a token."""

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import jwt
import plain
import pytest
from documents import BLOCKS, below
from running import Broker, broker, free_port, output_of, tool, until

pytestmark = pytest.mark.parts

AGENT = "A78WKV4515"

ROUTES = "The route of your backend"
"""The heading under which every backend has its own."""

DJANGO = """
from django.conf import settings

settings.configure(ROOT_URLCONF="urls", ALLOWED_HOSTS=["127.0.0.1"], SECRET_KEY="for this test")
import django
from django.core.wsgi import get_wsgi_application

serve(get_wsgi_application())
"""

FLASK = """
from flask_app import app

serve(app)
"""

WSGI = """
import os
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server


class Threads(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def serve(app):
    make_server("127.0.0.1", int(os.environ["PORT"]), app, Threads).serve_forever()

"""

NEXT = """
import { createServer } from "node:http";
import { POST } from "./route.mjs";

createServer(async (incoming, outgoing) => {
  const chunks = [];
  for await (const chunk of incoming) chunks.push(chunk);
  const body = Buffer.concat(chunks);
  const answer = await POST(new Request("http://site" + incoming.url, { method: "POST", body }))
    .catch(() => new Response(null, { status: 500 }));
  outgoing.writeHead(answer.status, Object.fromEntries(answer.headers));
  outgoing.end(Buffer.from(await answer.arrayBuffer()));
}).listen(process.env.PORT, "127.0.0.1");
"""
"""What Next.js does with a route handler: a standard Request in, a standard Response out."""


def snippet(heading: str) -> str:
    """Return the block under this heading."""
    (block,) = [block for block in BLOCKS if block.heading == heading]
    return block.text


def node(folder: Path) -> list[str]:
    """Run it as it is."""
    (folder / "server.mjs").write_text(snippet("Node"), encoding="utf-8")
    return ["node", "server.mjs"]


def express(folder: Path, packages: Path) -> list[str]:
    """Run it with the locked Express."""
    (folder / "node_modules").symlink_to(packages / "node_modules")
    (folder / "server.mjs").write_text(snippet("Express"), encoding="utf-8")
    return ["node", "server.mjs"]


def next_js(folder: Path) -> list[str]:
    """Run the handler as Next.js does, without the rest of it."""
    (folder / "route.mjs").write_text(snippet("Next.js"), encoding="utf-8")
    (folder / "server.mjs").write_text(NEXT, encoding="utf-8")
    return ["node", "server.mjs"]


def fastapi(folder: Path) -> list[str]:
    """Run it by uvicorn."""
    (folder / "main.py").write_text(snippet("FastAPI"), encoding="utf-8")
    return [tool("uvicorn"), "main:app", "--log-level=warning", "--port"]


def flask(folder: Path) -> list[str]:
    """Run it by the standard library's server."""
    (folder / "flask_app.py").write_text(snippet("Flask"), encoding="utf-8")
    (folder / "serve.py").write_text(WSGI + FLASK, encoding="utf-8")
    return [sys.executable, "serve.py"]


def django(folder: Path) -> list[str]:
    """Run it with the least settings there are."""
    (folder / "urls.py").write_text(snippet("Django"), encoding="utf-8")
    (folder / "serve.py").write_text(WSGI + DJANGO, encoding="utf-8")
    return [sys.executable, "serve.py"]


def go(folder: Path) -> list[str]:
    """Build it; it must be formatted, too."""
    source = folder / "main.go"
    source.write_text(snippet("Go"), encoding="utf-8")
    assert output_of(["gofmt", "-l", str(source)]) == ""
    binary = folder / "server"
    output_of(["go", "build", "-o", str(binary), str(source)])
    return [str(binary)]


def php(folder: Path) -> list[str]:
    """Run it by PHP's own server, without any extension."""
    (folder / "avatar-token.php").write_text(snippet("PHP"), encoding="utf-8")
    return ["php", "-n", "-d", "display_errors=stderr", "-S"]


BACKENDS: dict[str, Callable[..., list[str]]] = {
    "Node": node,
    "Express": express,
    "Next.js": next_js,
    "FastAPI": fastapi,
    "Flask": flask,
    "Django": django,
    "Go": go,
    "PHP": php,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run one broker for all backends; a visitor's bucket of five refills in minutes."""
    slow = {"limits.fingerprint.rate": 1, "limits.fingerprint.burst": 5}
    with broker(tmp_path_factory.mktemp("broker"), slow) as started:
        yield started


@contextmanager
def serving(command: list[str], folder: Path, broker_url: str, secret: str) -> Iterator[str]:
    """Run a backend; yields the URL of its route."""
    port = free_port()
    if command[-1] == "--port":
        command = [*command, str(port)]
    elif command[-1] == "-S":
        command = [*command, f"127.0.0.1:{port}", "avatar-token.php"]
    environment = {
        **os.environ,
        "BROKER_URL": broker_url,
        "BROKER_API_SECRET": secret,
        "PORT": str(port),
    }
    url = f"http://127.0.0.1:{port}/avatar-token"
    log = folder / "backend.log"
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        ) as process,
    ):
        try:
            until(lambda: _listens(url), f"{command[0]}; it wrote {log.read_text()}")
            yield url
            assert process.poll() is None, log.read_text()  # it survived everything
        finally:
            process.kill()


def _listens(url: str) -> bool:
    try:
        plain.get(url, timeout=5)
    except httpx.TransportError:
        return False
    return True


def request_token(url: str, fingerprint: object) -> httpx.Response:
    """Ask as embed.js does."""
    body = {"agent_id": "IGNORED", "fingerprint": fingerprint}
    return plain.post(url, json=body, timeout=60)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_route_hands_out_tokens_and_passes_refusals_on(
    running: Broker, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """A token of the backend's own agent, the same again; 400 and 429 as the broker words them."""
    needs = {"packages": request.getfixturevalue("packages")} if name == "Express" else {}
    command = BACKENDS[name](tmp_path, **needs)
    visitor = secrets.token_hex(16)
    with serving(command, tmp_path, running.url, running.secret) as url:
        first, again = request_token(url, visitor), request_token(url, visitor)
        assert first.status_code == 200, first.text
        data: dict[str, Any] = first.json()["data"]
        assert again.json()["data"] == data
        claims = jwt.decode(data["token"], options={"verify_signature": False})
        assert (claims["sub"], claims["fingerprint"]) == (AGENT, visitor)
        assert first.headers["Cache-Control"] == "no-store"
        assert first.headers["Content-Type"].startswith("application/json")

        wrong = request_token(url, "anonymous")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "VALIDATION_ERROR")
        for body in (b"", b"{", b"[]", b'"text"', b"{}", b'{"fingerprint": 7}'):
            broken = plain.post(url, content=body, headers={"Content-Type": "application/json"})
            assert broken.status_code >= 400, body
            assert running.secret not in broken.text
            assert 'success":true' not in broken.text

        refused = [request_token(url, visitor) for _ in range(4)][-1]
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
        assert int(refused.headers["Retry-After"]) >= 1


class Unwell(ThreadingHTTPServer):
    """Stands in the place of a broker that fails in the way that the fingerprint names."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Failing)
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class _Failing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["fingerprint"] == HALF:  # a head, the half of a body, and silence
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"success":true')
        if asked["fingerprint"] in {SILENT, HALF}:
            assert isinstance(self.server, Unwell)
            self.server.over.wait()

    def log_message(self, *_: object) -> None: ...


GONE, SILENT, HALF = "aaaaaaaa", "bbbbbbbb", "cccccccc"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_route_is_502_where_the_broker_is_down_or_slow(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """With Retry-After, so that the page tries again; a silent broker holds nobody for ever.

    The three ways to be slow are asked at the same time: each takes the timeout of the snippet.
    """
    needs = {"packages": request.getfixturevalue("packages")} if name == "Express" else {}
    command = BACKENDS[name](tmp_path, **needs)
    with serving(command, tmp_path, f"http://127.0.0.1:{free_port()}", "x") as url:
        told = [request_token(url, "beefbeef")]
    with (
        Unwell() as unwell,
        serving(command, tmp_path, unwell.url, "x") as url,
        ThreadPoolExecutor() as threads,
    ):
        told += threads.map(lambda way: request_token(url, way), (GONE, SILENT, HALF))
    for way, answer in zip(("down", GONE, SILENT, HALF), told, strict=True):
        assert answer.status_code == 502, (way, answer.text)
        assert answer.headers["Retry-After"] == "2", way
        assert "success" not in answer.text


def test_the_curl_line_is_the_one_that_the_broker_prints(running: Broker) -> None:
    """But for address and secret; and it works."""
    line = snippet("curl").strip()
    real = line.replace("http://127.0.0.1:8080", running.url)
    real = real.replace("CLIENT_SECRET", running.secret)
    assert real == running.curl_line
    assert json.loads(output_of(["bash", "-c", real]))["success"] is True


def test_every_backend_is_run(running: Broker) -> None:
    """A new heading needs a runner here."""
    assert [section.heading for section in below(ROUTES)] == ["curl", *BACKENDS]
