"""The shipped configurations of nginx, Envoy and Caddy, started for real on ports of a test."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import plain
from running import START, daemon, free_port, tool, until

CONFIG = Path(__file__).parents[2] / "config"

KINDS = ("nginx", "envoy", "caddy")

FILES = {"nginx": "{}.conf", "envoy": "{}.yaml", "caddy": "{}.Caddyfile"}

ENTRANCES = {
    ("nginx", "viewer"): 8081,
    ("envoy", "viewer"): 8082,
    ("caddy", "viewer"): 8083,
    ("caddy", "gateway"): 8087,
    ("nginx", "gateway"): 8088,
    ("envoy", "gateway"): 8089,
}
"""The port of each shipped file at which its clients come in."""

AGENT = "A78WKV4515"

NGINX_MAIN = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    access_log off;
    include {site};
}}
"""
"""What a distribution ships around a site."""


class Broker:
    """A broker with a configuration file, that can be ended and started again at its port."""

    def __init__(self, folder: Path, settings: Mapping[str, object] | None = None) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.secret, self.key = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
        self._folder = folder
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / f"broker-{self.port}.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that it wrote, over all its lives."""
        return self._log.read_text(encoding="utf-8")

    def like(self, other: "Broker") -> "Broker":
        """Share the secrets of another one."""
        self.secret, self.key = other.secret, other.key
        return self

    def environment(self) -> dict[str, str]:
        """Return the variables that configure it."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BROKER_")}
        settings = {
            "server.listen": f"127.0.0.1:{self.port}",
            "server.trusted_proxies": "127.0.0.1",
            "server.drain": "8s",
            "server.drain_lead": "2s",
            "admin.listen": f"127.0.0.1:{self.admin_port}",
            "clients.web.secret": self.secret,
            "clients.web.agents": "*",
            "issuer.local.keys.main.secret": self.key,
            **self._settings,
        }
        ours = {f"BROKER_{k.upper().replace('.', '__')}": str(v) for k, v in settings.items()}
        return {**kept, **ours}

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "broker", "serve"], stderr=log, env=self.environment()
            )
        until(lambda: _status(f"{self.url}/readyz") == httpx.codes.OK, "the broker")

    def stop(self) -> None:
        """End it as a supervisor does, and wait for the end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(timeout=START) == 0, self.log

    def kill(self) -> None:
        """Leave nothing behind."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def token(self, fingerprint: str | None = None, *, agent: str = AGENT) -> dict[str, Any]:
        """Have a token minted; returns the answer's `data`."""
        body = {"agent_id": agent, "fingerprint": fingerprint or secrets.token_hex(16)}
        answer = plain.post(
            f"{self.url}/v1/embed-tokens/request", json=body, headers={"api-secret": self.secret}
        )
        data: dict[str, Any] = answer.raise_for_status().json()["data"]
        return data


@contextmanager
def brokers(*given: Broker) -> Iterator[tuple[Broker, ...]]:
    """Run brokers; none of them may write a defect."""
    try:
        for broker in given:
            broker.start()
        yield given
        for broker in given:
            assert "broker.defect" not in broker.log
    finally:
        for broker in given:
            broker.kill()


class Site:
    """A server behind a proxy: answers what it was asked, and remembers it."""

    def __init__(self, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.seen: list[dict[str, Any]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                asked = {
                    "method": self.command,
                    "path": self.path,
                    "headers": [(name.lower(), value) for name, value in self.headers.items()],
                    "body": self.rfile.read(length).decode(),
                }
                site.seen.append(asked)
                body = json.dumps(asked).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_POST = do_HEAD = do_GET  # noqa: N815 - the server's names

            def log_message(self, *_args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def gateway(
    kind: str,
    name: str,
    folder: Path,
    ports: Mapping[int, int],
    *,
    required_agent: bool = False,
) -> Iterator[str]:
    """Run a shipped configuration; yields its URL.

    `ports` replaces those behind it; the line that requires an agent is a comment as it ships.
    """
    entrance = free_port()
    text = (CONFIG / kind / FILES[kind].format(name)).read_text(encoding="utf-8")
    for shipped, ours in {ENTRANCES[kind, name]: entrance, **ports}.items():
        text, found = re.subn(rf"(127\.0\.0\.1:|port_value: ){shipped}\b", rf"\g<1>{ours}", text)
        assert found, f"{shipped} is not in the {name} of {kind}"
    text = text.replace("/var/log/nginx", str(folder))
    if required_agent:
        text, found = re.subn(r"# (.*)(require-agent)", r"\1\2", text, flags=re.IGNORECASE)
        assert found == 1
        text = text.replace("headers_to_add: []\n", "\n")
    file = folder / FILES[kind].format(name)
    file.write_text(text, encoding="utf-8")
    log = folder / f"{kind}.log"
    with daemon(
        _command(kind, file, folder), log, f"http://127.0.0.1:{entrance}/", any_status=True
    ):
        yield f"http://127.0.0.1:{entrance}"


@contextmanager
def nginx(text: str, folder: Path, entrance: int) -> Iterator[str]:
    """Run nginx with a site of the test's own; yields its URL."""
    file = folder / "site.conf"
    file.write_text(text, encoding="utf-8")
    url = f"http://127.0.0.1:{entrance}"
    with daemon(_command("nginx", file, folder), folder / "site.log", f"{url}/", any_status=True):
        yield url


def logged(kind: str, folder: Path) -> str:
    """Return everything that the proxy wrote."""
    names = (f"{kind}.log", "embed-viewer.log", "embed-viewer-error.log", "nginx-error.log")
    return "".join((folder / name).read_text() for name in names if (folder / name).exists())


def _command(kind: str, file: Path, folder: Path) -> list[str]:
    if kind == "envoy":
        return [
            tool("envoy"),
            "--config-path",
            str(file),
            "--use-dynamic-base-id",
            "--concurrency",
            "2",
        ]
    if kind == "caddy":
        return [tool("caddy"), "run", "--adapter", "caddyfile", "--config", str(file)]
    main = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    main.write_text(NGINX_MAIN.format(folder=folder, site=file, user=user), encoding="utf-8")
    return ["/usr/sbin/nginx", "-c", str(main), "-p", str(folder)]


def _status(url: str) -> int:
    try:
        return plain.get(url).status_code
    except httpx.TransportError:
        return 0
