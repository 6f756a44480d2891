"""Random streams of bytes for a listener, and two listeners that must answer them alike.

`Worlds` has everything twice, with the fast lane and without it: routes, limits, tokens, clocks.
A stream is drawn from a seed: requests good and bad, mutated, cut anywhere, repeated, with pauses
of the reader, changes of clients and the beginning of a drain in between.  Both are sent the same;
what they write, whether they end the connection, and what they count must be equal.
"""

import asyncio
import random
import re
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from service import Service, limits
from typing_extensions import override

from broker.errors import StoreAway
from broker.model import Outcome, Secret, TokenRequest
from broker.sessions.admin import TokenIntrospector
from broker.stores.base import Visit, VisitListener
from broker.stores.memory import MemoryStore
from broker.telemetry.metrics import Metrics
from broker.telemetry.readiness import Readiness
from broker.testing import FakeClock
from broker.web import token_status
from broker.web.auth import Client, ClientAuthenticator
from broker.web.connection import DataConnection
from broker.web.lane import Lane
from broker.web.router import TOKEN_PATH, Routes, new_ids
from broker.web.server import DataServer

SECRETS = ["first-" + "s" * 20, "second-" + "s" * 20]
"""Of the one client and of the other, who is not always known."""

TIGHT, ROOMY = (60, 4), (60_000, 1_000_000)


class Stream(NamedTuple):
    """What is sent, piece by piece, and what happens at these pieces."""

    pieces: list[bytes]
    settled: set[int]
    """Before these pieces the listener gets the time to answer all that it has."""
    pauses: int
    """At the write of this number the reader stops, until all has been sent; -1: never."""
    changes: dict[int, bool]
    """Before these pieces the clients change: whether the second one is known."""
    drains: int
    """Before this piece the drain begins; -1: never."""
    ends: bool
    """Whether the client ends its sending half."""
    turns: dict[int, int]
    """Before these pieces so many turns of the loop pass."""
    leaves: str
    """How the client leaves without awaiting its answers: "", "end" of its half, or "gone"."""


class Seen(NamedTuple):
    """What a client sees, what was counted, and what the issuer was asked: id and trace."""

    written: bytes
    asked: list[tuple[str, str]]
    is_closed: bool
    counted: list[float]


class WaitingStore(MemoryStore):
    """A store elsewhere: visits take some turns of the loop, and some do not go as asked.

    Every eleventh cannot be asked for by a question, others are told that nothing was done, or that
    the store is away.
    """

    asked = 0

    @override
    def visit(self, request: TokenRequest, now: int) -> Visit:
        return None  # type: ignore[return-value]  # as the base of all stores does

    @override
    def start_visit(self, request: TokenRequest, now: int, listener: VisitListener) -> bool:
        self.asked += 1
        if not self.asked % 11:
            return False
        self._answer_after(self.asked % 7 + 1, self.asked, request, listener)
        return True

    def _answer_after(
        self, turns: int, number: int, request: TokenRequest, listener: VisitListener
    ) -> None:
        if turns:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._answer_after, turns - 1, number, request, listener)
        elif not number % 13:
            listener.tell(StoreAway() if number % 2 else None)
        else:
            listener.tell(super().visit(request, self._clock.mono()))

    @override
    async def admit(self, request: TokenRequest, key: str) -> Visit:
        for _ in range(3):
            await asyncio.sleep(0)
        return super().visit(request, self._clock.mono())


class Wire(asyncio.Transport):
    """Keeps what is written; its reader may stop once."""

    def __init__(self, pauses: int) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.pauses = pauses
        self.is_paused = False
        self.closed = False
        self.connection: DataConnection | None = None

    @override
    def write(self, data: Any) -> None:
        if self.closed:
            return
        self.written.append(bytes(data))
        if len(self.written) == self.pauses and self.connection is not None:
            self.is_paused = True
            self.connection.pause_writing()

    @override
    def is_closing(self) -> bool:
        return self.closed

    @override
    def close(self) -> None:
        self.closed = True

    @override
    def abort(self) -> None:
        self.closed = True

    @override
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    @override
    def pause_reading(self) -> None: ...

    @override
    def resume_reading(self) -> None: ...

    @override
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 50_000) if name == "peername" else default


class World:
    """A listener without a network, on the story as it is and an issuer of known tokens."""

    def __init__(self, *, lane: bool, waits: bool = False) -> None:
        self.clock = FakeClock()
        self.service = Service(
            self.clock,
            limits=limits(fingerprint=TIGHT, mints=ROOMY, agent=ROOMY),
            store=WaitingStore if waits else MemoryStore,
        )
        # when a renewal in the background has ended is nobody's promise
        self.service.minter.may_renew_ahead = lambda _key: False  # type: ignore[method-assign]
        self.metrics = Metrics("local")
        self.readiness = Readiness()
        self.authenticator = ClientAuthenticator([], [], self.clock.mono())
        self.know(second=True)
        self.routes = Routes(
            self.authenticator,
            self.service.service,
            self.metrics,
            self.clock,
            self.readiness,
            deadline=12.0,
            any_fingerprint=False,
        )
        self.routes.new_id = new_ids("id").__next__
        service = self.service
        introspector = TokenIntrospector(
            service.issuer, service.session_store, service.store, self.metrics.sessions
        )
        token_status.add(
            self.routes, self.authenticator, introspector, self.clock, service.store.charge_client
        )
        way = Lane(self.routes.lane, self.routes) if lane else None
        if way is not None:
            self.authenticator.when_changed(way.forget)
        gauge = self.metrics.process.connections
        self.server = DataServer(self.routes, self.routes.error_head, gauge, 75.0, way)

    def know(self, *, second: bool) -> None:
        """Know the first client, and perhaps the second one."""
        names = ["web", "app"][: 1 + second]
        self.authenticator.use_clients(
            [
                Client(name, Secret(secret).digest(), None, allow_origin=False)
                for name, secret in zip(names, SECRETS, strict=False)
            ]
        )

    async def run(self, stream: Stream) -> Seen:
        """Send a stream on a connection of its own."""
        wire, before = Wire(stream.pauses), len(self.service.issuer.requests)
        connection = self.server()
        assert isinstance(connection, DataConnection)
        wire.connection = connection
        connection.connection_made(wire)
        await self._send(stream, connection, wire)
        await self._leave(stream, connection, wire)
        asked = [(it.request_id, it.traceparent) for it in self.service.issuer.requests[before:]]
        seen = Seen(b"".join(wire.written), asked, wire.closed, self._counted())
        task = connection._task_handler
        connection.connection_lost(None)
        assert getattr(connection, "_later", None) is None
        if task is not None:
            await asyncio.wait([task])
        await settle()
        self.readiness.draining = False
        self.know(second=True)
        self.clock.advance(0.7)
        return seen

    async def _send(self, stream: Stream, connection: DataConnection, wire: Wire) -> None:
        buffers = False  # what follows an upgrade is one packet until that is answered: who is when
        for number, piece in enumerate(stream.pieces):
            if number in stream.settled or number in stream.changes or number == stream.drains:
                await settle()
            if number in stream.changes:
                self.know(second=stream.changes[number])
            if number == stream.drains:
                self.readiness.draining = True
            # else who is faster answers before the body is there
            if connection._body.is_eof() and not buffers:
                for _ in range(stream.turns.get(number, 0)):
                    await asyncio.sleep(0)
            if wire.closed:
                break
            connection.data_received(piece)
            buffers = buffers or b"upgrade" in piece.lower()

    async def _leave(self, stream: Stream, connection: DataConnection, wire: Wire) -> None:
        if stream.leaves == "gone":
            wire.close()
            return
        if stream.leaves == "end" and not wire.closed and not connection.eof_received():
            wire.close()
        await settle()
        if wire.is_paused and not wire.closed:
            connection.resume_writing()
            await settle()
        if stream.ends and not stream.leaves and not wire.closed:
            if not connection.eof_received():
                wire.close()
            await settle()

    def _counted(self) -> list[float]:
        cells = self.metrics.layout.cells
        requests = self.metrics.requests
        ends = [requests[outcome]._sum for outcome in Outcome]
        firsts = [requests[outcome]._first for outcome in Outcome]
        counts = [
            sum(cells[index] for index in range(first, end))
            for first, end in zip(firsts, ends, strict=True)
        ]
        rejected = [counter.value for counter in self.metrics.rejections.values()]
        checks = [counter.value for counter in self.metrics.sessions.checks.values()]
        return [*counts, *rejected, *checks, self.server.requests_count]


async def settle() -> None:
    """Let everything run that can, without time."""
    ready: Any = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    while True:
        await asyncio.sleep(0)
        if not ready:
            return


class Worlds:
    """The same listener with the fast lane and without it; with a store that `waits`, if wanted."""

    def __init__(self, *, waits: bool = False) -> None:
        self._waits = waits
        self.tokens: list[str] = ["token-none"]
        self._begin()

    def _begin(self) -> None:
        self.fast = World(lane=True, waits=self._waits)
        self.ordinary = World(lane=False, waits=self._waits)

    async def compare(self, seed: int) -> str:
        """Send the stream of this seed to both; returns what differs, empty if nothing does."""
        stream = draw(random.Random(seed), self.tokens)
        if not self._waits:
            stream = stream._replace(leaves="")
        fast, ordinary = await self.fast.run(stream), await self.ordinary.run(stream)
        if stream.leaves:
            self._begin()  # what was charged before the client left is nobody's promise
            at_least, all_of_it = _without_close(ordinary), _without_close(fast)
            return (
                "" if all_of_it.startswith(at_least) else _difference(seed, stream, fast, ordinary)
            )
        found = re.findall(rb'"token":"([^"]+)"', ordinary.written)
        self.tokens = [*self.tokens, *(token.decode() for token in found)][-20:]
        if fast == ordinary:
            return ""
        return _difference(seed, stream, fast, ordinary)


def _difference(seed: int, stream: Stream, fast: Seen, ordinary: Seen) -> str:
    return f"seed {seed}:\n{stream}\nfast lane: {fast}\nordinary:  {ordinary}"


def _without_close(seen: Seen) -> bytes:
    """Return what was written; that an answer is the last one may have been told or not."""
    return seen.written.replace(b"Connection: close\r\n", b"")


def draw(rng: random.Random, tokens: list[str]) -> Stream:
    """Draw a stream."""
    known = [_request(rng, tokens) for _ in range(rng.randint(1, 3))]
    requests = [rng.choice(known) for _ in range(rng.randint(1, 8))]
    if rng.random() < 0.4:
        requests = [_mutated(rng, data) if rng.random() < 0.3 else data for data in requests]
    requests = [_traced(rng, data) for data in requests]
    pieces: list[bytes] = []
    for data in requests:
        pieces += _cut(rng, data)
    if rng.random() < 0.15:
        pieces = _joined(rng, pieces)
    if rng.random() < 0.2:
        pieces = _led_on(rng, pieces)
    numbers = range(len(pieces))
    often = rng.choice((0.0, 0.5, 1.0, 1.0, 1.0))
    changes = {n: rng.random() < 0.5 for n in numbers if rng.random() < 0.05}
    return Stream(
        pieces,
        {n for n in numbers if rng.random() < often},
        rng.randint(1, 4) if rng.random() < 0.1 else -1,
        changes if rng.random() < 0.2 else {},
        rng.choice(numbers) if rng.random() < 0.05 else -1,
        rng.random() < 0.2,
        {n: rng.randint(1, 12) for n in numbers if rng.random() < 0.3},
        rng.choice(("end", "gone")) if rng.random() < 0.1 else "",
    )


_TRACE = "00-" + "7" * 32 + "-" + "7" * 16 + "-01"


def _traced(rng: random.Random, data: bytes) -> bytes:
    """Give a request a trace of its own, if it has one; some are no good."""
    trace = f"00-{rng.randrange(1, 2**128):032x}-{rng.randrange(2**64):016x}-01"
    hidden = "\r\nOrigin: https://shop.example"  # as long as a trace, and more than one line
    odd = (
        *("ff" + trace[2:], trace.upper(), trace[:-1], trace + "-9", "00-" + "0" * 32 + trace[35:]),
        *("\0", trace[:54] + "\0", hidden.rjust(55, "7"), trace[:51] + "\r\n\r\n", "\r\n\r\n"),
    )
    chosen = trace if rng.random() < 0.8 else rng.choice(odd)
    return data.replace(_TRACE.encode(), chosen.encode())


def _cut(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut a request: mostly not, between head and body, anywhere, or into bytes."""
    kind = rng.random()
    if kind < 0.7 or len(data) < 2:
        return [data]
    if kind < 0.8:
        head, end, body = data.partition(b"\r\n\r\n")
        return [piece for piece in (head + end, body) if piece]
    places = sorted({rng.randrange(1, len(data)) for _ in range(rng.choice((1, 1, 2, 5)))})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def _joined(rng: random.Random, pieces: list[bytes]) -> list[bytes]:
    """Send several pieces as one: pipelined, or with the beginning of the next one behind it."""
    joined = [pieces[0]]
    for piece in pieces[1:]:
        if rng.random() < 0.5:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _led_on(rng: random.Random, pieces: list[bytes]) -> list[bytes]:
    """Have a piece be no request: what begins before it, or behind the piece before, goes on."""
    place = rng.randrange(len(pieces))
    begun = rng.choice((b"GET /livez HTTP/1.1\r\nHost: b\r\nX-Part: ", b"G", b"\r"))
    if place and rng.random() < 0.5:
        return [*pieces[: place - 1], pieces[place - 1] + begun, *pieces[place:]]
    return [*pieces[:place], begun, *pieces[place:]]


def _mutated(rng: random.Random, data: bytes) -> bytes:
    """Change, drop, double or insert a few bytes."""
    for _ in range(rng.choice((1, 1, 1, 3))):
        place, kind = rng.randrange(len(data)), rng.randrange(4)
        byte = bytes([rng.choice((rng.randrange(256), *b"\r\n :0,\t\0"))])
        if kind == 0:
            data = data[:place] + byte + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + data[place + 1 :] or b"\n"
        elif kind == 2:
            data = data[:place] + byte + data[place:]
        else:
            end = place + rng.randrange(1, 30)
            data = data[:end] + data[place:]
    return data


Part = Callable[[random.Random, list[str]], tuple[str, str, list[str], bytes]]
"""Method, target, header lines and body of a request."""


def _token(rng: random.Random, _tokens: list[str]) -> tuple[str, str, list[str], bytes]:
    fields = [
        f'"agent_id":"{rng.choice(("A1", "A1", "B2"))}"',
        f'"fingerprint":"{rng.randrange(0xABC0, 0xABC6):x}"',
    ]
    if rng.random() < 0.1:
        fields.append(
            rng.choice(('"fresh":true', '"fresh":true', '"model":"m"', '"model":1', '"x":[[1]]'))
        )
    body = "{" + ",".join(fields) + "}"
    if rng.random() < 0.15:
        odd = ("", "{}", "[", "null", body[:-1], "\ufeff" + body, '{"agent_id":"A1"}', " " * 9000)
        body = rng.choice(odd)
    secret = rng.choice((*SECRETS, *SECRETS, *SECRETS, "unknown"))
    lines = [f"api-secret: {secret}"] if rng.random() < 0.95 else []
    if rng.random() < 0.05:
        lines = [f"Authorization: Bearer {secret}"]
    return "POST", TOKEN_PATH, lines, body.encode()


def _verify(rng: random.Random, tokens: list[str]) -> tuple[str, str, list[str], bytes]:
    token = rng.choice(tokens)
    lines = [rng.choice((f"X-Embed-Token: {token}", f"Authorization: Bearer {token}"))]
    if rng.random() < 0.2:
        lines.append(f"X-Embed-Require-Agent: {rng.choice(('A1', 'B2'))}")
    if rng.random() < 0.1:
        lines.append(f"X-Original-URI: /x?token={rng.choice(tokens)}")
    method = rng.choice(("GET", "GET", "GET", "HEAD", "POST", "OPTIONS"))
    return method, "/v1/embed-tokens/verify", lines, b"" if rng.random() < 0.9 else b"body"


def _status(rng: random.Random, tokens: list[str]) -> tuple[str, str, list[str], bytes]:
    path = rng.choice(("/v1/introspect", "/v1/introspect", "/v1/introspect", "/v1/revoke"))
    body = rng.choice((f"token={rng.choice(tokens)}", f"token={rng.choice(tokens)}", "token=", "a"))
    return "POST", path, [f"api-secret: {rng.choice(SECRETS)}"], body.encode()


def _other(rng: random.Random, _tokens: list[str]) -> tuple[str, str, list[str], bytes]:
    target = rng.choice(
        ("/livez", "/readyz", "/nowhere", "*", f"{TOKEN_PATH}?a=b", f"http://h{TOKEN_PATH}", "h:1")
    )
    method = rng.choice(("GET", "GET", "POST", "HEAD", "DELETE", "CONNECT", "OPTIONS", "BREW"))
    return method, target, [], b""


_PARTS: list[Part] = [_token, _token, _token, _token, _verify, _status, _other]

_LINES = [
    "Connection: close",
    "Connection: keep-alive",
    "Connection: Upgrade\r\nUpgrade: websocket",
    "Connection: Upgrade\r\nUpgrade: h2c",
    "Expect: 100-continue",
    "Expect: nonsense",
    "Origin: https://shop.example",
    "Content-Encoding: gzip",
    "Content-Encoding: identity",
    "X-Request-Id: given-1",
    "X-Request-Id: not given",
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "Content-Length: 3",
    "Transfer-Encoding: chunked",
    "TE: trailers",
    "Host: other",
    "api-secret: " + SECRETS[0],
    "X-Forwarded-For: 203.0.113.9",
    "Content-Type: application/json",
    "Cookie: " + "c" * 3000,
    "Bad\x01Header: x",
    " folded",
]


def _request(rng: random.Random, tokens: list[str]) -> bytes:
    """Write a request: mostly a plain one, else with one or two things that are not."""
    method, target, lines, body = rng.choice(_PARTS)(rng, tokens)
    version = (
        "HTTP/1.1" if rng.random() < 0.95 else rng.choice(("HTTP/1.0", "HTTP/1.2", "http/1.1"))
    )
    if rng.random() < 0.97:
        lines.insert(0, "Host: broker")
    if rng.random() < 0.1:
        lines.append(f"X-Any: {''.join(rng.choices(string.ascii_letters, k=8))}")
    is_chunked = rng.random() < 0.05
    if is_chunked:
        lines.append("Transfer-Encoding: chunked")
    elif body or rng.random() < 0.2:
        lines.append(f"Content-Length: {len(body) + rng.choice((0,) * 30 + (1, -1, 9000)):d}")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_LINES))
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines) + 1), "traceparent: " + _TRACE)
    if rng.random() < 0.05:
        lines = [line.upper() if rng.random() < 0.5 else line.lower() for line in lines]
    end = "\n" if rng.random() < 0.01 else "\r\n"
    head = end.join([f"{method} {target} {version}", *lines, "", ""])
    before = rng.choice(("\r\n", "\r\n\r\n", "\n")) if rng.random() < 0.03 else ""
    if is_chunked:
        cut = rng.randrange(len(body) + 1)
        chunks = [chunk for chunk in (body[:cut], body[cut:]) if chunk]
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    return (before + head).encode("latin-1") + body
