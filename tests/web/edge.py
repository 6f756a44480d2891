"""A whole broker on a loopback port, and somebody who talks to it byte by byte.

No HTTP client stands in between: an answer is compared as it came, every header in its order.
Secrets are made anew for each broker; time stands still unless a test lets it pass.
"""

import asyncio
import io
import json
import logging
import os
import resource
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import msgspec
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from broker.app.app import App
from broker.app.wiring import NO_LANE
from broker.config import load as config
from broker.config.settings import Settings
from broker.model import Clock
from broker.telemetry import logs
from broker.testing import FakeClock

TOKEN_PATH = "/v1/embed-tokens/request"
AGENT = "A78WKV4515"
OTHER_AGENT = "B12XYZ9876"

FRAME = ("success", "status", "status_code", "error")
"""The fields of an error's envelope, in their order."""


class Reply(msgspec.Struct, frozen=True):
    """An answer as it came: status line, headers in their order, body."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the one header of this name; two of a kind are a failure."""
        values = [value for known, value in self.headers if known.lower() == name.lower()]
        assert len(values) <= 1, f"{name} was sent {len(values)} times"
        return values[0] if values else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code; checks the whole envelope and its three numbers on the way."""
        envelope = self.json
        assert tuple(envelope) == FRAME
        assert envelope["success"] is False
        assert envelope["status"] == "error"
        assert tuple(envelope["error"]) == ("code", "message", "httpStatus")
        assert envelope["status_code"] == envelope["error"]["httpStatus"] == self.status
        return envelope["error"]["code"]

    @property
    def message(self) -> str:
        return self.json["error"]["message"]

    @property
    def token(self) -> str:
        assert self.status == 200, self.body
        return self.json["data"]["token"]

    @property
    def session(self) -> str:
        data = self.json["data"]
        assert data["session_id"] == data["sid"]
        return data["session_id"]

    @property
    def cache_status(self) -> str | None:
        return self.header("Cache-Status")

    @property
    def text(self) -> str:
        """All of it, for searches."""
        lines = [
            f"{self.status} {self.reason}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\n".join(lines) + self.body.decode("utf-8", "backslashreplace")


_opened: list[Callable[[], object]] = []
"""What ends each connection that a test has opened."""


def closing_later(end: Callable[[], object]) -> None:
    """Have a connection ended with the test, if that fails, too (a fixture of conftest does it).

    One that is left is collected later, and its ResourceWarning fails whichever test runs then.
    """
    _opened.append(end)


def hang_up() -> None:
    """End what the test that ran last has opened; to end one again has no effect."""
    while _opened:
        _opened.pop()()


class Line:
    """One connection to a listener."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        closing_later(writer.transport.abort)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, bodyless: bool = False) -> Reply:
        """Read one answer; `bodyless` for that to a HEAD."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = tuple(
            (name, value) for name, _, value in (line.partition(": ") for line in lines)
        )
        length = next(int(value) for name, value in headers if name == "Content-Length")
        body = b"" if bodyless else await self.reader.readexactly(length)
        return Reply(int(status), reason, headers, body)

    async def rest(self) -> bytes:
        """Return everything until the broker closes the connection."""
        data = bytearray()
        with suppress(ConnectionError):  # closed with something of ours unread: that ends it, too
            while chunk := await self.reader.read(65536):
                data += chunk
        return bytes(data)

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):  # the broker was faster
            await self.writer.wait_closed()


class Edge:
    """A running broker.  `secret` is that of its client `web`, `key` signs."""

    def __init__(self, app: App, clock: Clock, log: io.StringIO, secret: str, key: str) -> None:
        self.app = app
        self.clock = clock
        self.log = log
        self.secret = secret
        self.key = key
        self.defects_expected = False

    @property
    def time(self) -> FakeClock:
        """The clock, for tests that let time pass."""
        assert isinstance(self.clock, FakeClock)
        return self.clock

    @property
    def port(self) -> int:
        return int(self.app.url.rpartition(":")[2])

    @property
    def admin_port(self) -> int:
        return int(self.app.admin_url.rpartition(":")[2])

    async def connect(self, *, source: str | None = None, port: int | None = None) -> Line:
        address = None if source is None else (source, 0)
        return Line(
            *await asyncio.open_connection("127.0.0.1", port or self.port, local_addr=address)
        )

    async def raw(self, data: bytes, *, bodyless: bool = False, source: str | None = None) -> Reply:
        """Send bytes, read one answer, hang up."""
        line = await self.connect(source=source)
        try:
            line.send(data)
            return await line.answer(bodyless=bodyless)
        finally:
            await line.close()

    async def get(self, path: str, method: str = "GET", **headers: str) -> Reply:
        """Ask the data listener for something else than a token."""
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return await self.raw(request(method, path, named), bodyless=method == "HEAD")

    async def admin(self, path: str, method: str = "GET", **headers: str) -> Reply:
        """Ask the admin listener."""
        line = await self.connect(port=self.admin_port)
        try:
            line.send(request(method, path, list(headers.items())))
            return await line.answer(bodyless=method == "HEAD")
        finally:
            await line.close()

    def asking(
        self,
        fingerprint: str | None = None,
        *,
        agent: str = AGENT,
        secret: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        path: str = TOKEN_PATH,
        **fields: object,
    ) -> bytes:
        """Write a token request; a fingerprint left out is a new visitor's."""
        fields = {"agent_id": agent, "fingerprint": fingerprint or visitor(), **fields}
        body = json.dumps(fields).encode()
        return self.posting(body, secret=secret, headers=headers, path=path)

    def posting(
        self,
        body: bytes,
        *,
        secret: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        path: str = TOKEN_PATH,
    ) -> bytes:
        """Write a token request with this body."""
        own = [("api-secret", self.secret if secret is None else secret)]
        return request("POST", path, [*own, *headers], body)

    async def request_token(self, fingerprint: str | None = None, **how: Any) -> Reply:
        return await self.raw(self.asking(fingerprint, **how))

    async def post(self, body: bytes, **how: Any) -> Reply:
        return await self.raw(self.posting(body, **how))

    async def fail_to_log_in(self, *forwarded: str, source: str | None = None) -> Reply:
        """Ask with a secret that nobody has."""
        headers = [("X-Forwarded-For", value) for value in forwarded]
        wrong = secrets.token_urlsafe(24)
        return await self.raw(self.asking(secret=wrong, headers=headers), source=source)

    async def all_at_once(self, requests: Iterable[bytes]) -> list[Reply]:
        """Connect everybody first, then send everything, then read."""
        sent = list(requests)
        lines = await asyncio.gather(*(self.connect() for _ in sent))
        try:
            for line, data in zip(lines, sent, strict=True):
                line.send(data)
            return list(await asyncio.gather(*(line.answer() for line in lines)))
        finally:
            for line in lines:
                line.writer.close()
            await asyncio.gather(*(line.close() for line in lines))

    def mint_by(self, make: Callable[..., Any]) -> None:
        """Have mints made by this from now on: in flights, as if each could take its time."""
        minter, issuer = self.app.parts.minter, self.app.parts.issuer
        minter.mint_at_once = lambda *_: None  # type: ignore[method-assign]
        issuer.mint = make  # type: ignore[method-assign]

    async def scrape(self) -> dict[str, float]:
        """Read the metrics, as `name{label="value"}` without the volatile ones of the process."""
        reply = await self.admin("/metrics")
        return samples(reply.body.decode())

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What was logged (format json), all of it or one kind of event."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [event for event in lines if name is None or event["event"] == name]


def request(
    method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: bytes | None = None
) -> bytes:
    """Write a request, with a Content-Length if there is a body, as clients do."""
    given = [f"{name}: {value}" for name, value in headers]
    host = [] if any(line.startswith("Host:") for line in given) else ["Host: broker"]
    lines = [f"{method} {path} HTTP/1.1", *host, *given]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def visitor() -> str:
    """Make a new visitor's fingerprint."""
    return secrets.token_hex(16)


def samples(text: str) -> dict[str, float]:
    """Parse Prometheus' text format."""
    return {
        _series(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _series(name: str, labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inner}}}" if inner else name


def clock_of_today() -> FakeClock:
    """Make a clock that stands still at this moment, so that real verifiers accept its tokens."""
    return FakeClock(wall=time.time_ns() // 1_000_000_000 * 1_000_000 + 250_000)


@asynccontextmanager
async def serving(
    tree: Mapping[str, Any] | None = None,
    *,
    clock: Clock | None = None,
    form: str = "json",
    level: str = "debug",
    dev: bool = False,
) -> AsyncIterator[Edge]:
    """Run a broker with these settings on top of generated ones; stop it afterwards.

    No test leaves a defect in the log, a mint under way or a task behind unless it says so.
    """
    clock = clock or clock_of_today()
    secret, key = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    defaults = {
        "server": {"listen": "127.0.0.1:0", "drain": "2s", "drain_lead": "0s"},
        "admin": {"listen": "127.0.0.1:0"},
        "clients": {"web": {"secret": secret, "agents": ["*"]}},
        "issuer": {"local": {"keys": {"main": {"secret": key}}}},
        "log": {"format": form, "level": level},
    }
    settings = config.load(None, {}, tree or {}, defaults)
    log = io.StringIO()
    with logging_to(log, settings), pytest.MonkeyPatch.context() as patch:
        patch.setattr("broker.app.app.SystemClock", lambda: clock)
        patch.setattr("broker.app.app.GcTuner", _NoPauses)
        app = App(settings, lambda: settings, _switches(), dev=dev)
        before = asyncio.all_tasks()
        await app.start()
        edge = Edge(app, clock, log, secret, key)
        try:
            yield edge
        finally:
            app.stop()
            await app.run()
        for bug in ("broker.defect", "broker.background_restarted"):
            assert edge.defects_expected or bug not in log.getvalue(), log.getvalue()
        assert len(app.parts.token_service.flights) == 0
        await _settle(before)


def _switches() -> dict[str, str]:
    """Return what this process' environment says about the fast lane, and nothing else of it."""
    return {NO_LANE: os.environ[NO_LANE]} if NO_LANE in os.environ else {}


class _NoPauses:
    """Leaves the garbage collector, which here is pytest's, alone: it costs 0.1 s a broker."""

    def start(self) -> None: ...
    def tidy(self) -> None: ...
    def stop(self) -> None: ...


async def _settle(before: set[asyncio.Task[Any]]) -> None:
    """Wait for the connections' tasks to end; one that stays is a leak."""
    mine = {asyncio.current_task()}
    left = {task for task in asyncio.all_tasks() - before - mine if not task.done()}
    if left:
        _, left = await asyncio.wait(left, timeout=10)
    assert not left


@contextmanager
def logging_to(stream: io.StringIO, settings: Settings) -> Iterator[None]:
    """Log to a stream, and leave pytest's own logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # or `force` would close pytest's
    logs.configure(settings.log, stream)
    try:
        yield
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


def raise_file_limit(wanted: int = 8192) -> None:
    """Allow this process the sockets of a crowd, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
