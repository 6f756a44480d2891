"""Connections of both listeners of a real broker, byte by byte: rows N3, N4, N5, N8 and N23."""

import asyncio
import gzip
import json
import re
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp.web import BaseRequest, StreamResponse
from edge import TOKEN_PATH, Edge, Line, Reply, closing_later, hang_up, request, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import (
    Broker,
    good,
    merged,
    put,
    run,
    secret_in,
    toml,
    until,
    until_true,
    write,
)

from broker.config.settings import Settings
from broker.telemetry.cells import Gauge
from broker.web import body as bodies
from broker.web import server
from broker.web.connection import DataConnection
from broker.web.head_bounds import MAX_FIELD, MAX_FIELDS, MAX_HEAD

KEEP_ALIVE = 2.0
"""Seconds for which the broker of this module keeps an idle connection."""

TIMEOUT = 60.0
"""Seconds after which something that should happen is taken not to: machines are busy."""

VERIFY = "/v1/embed-tokens/verify"

INSIDE = b"GET /livez HTTP/1.1\r\nHost: broker\r\nX-Request-Id: inside\r\n\r\n"
"""A body that is a request, too: nobody may ever answer it."""

NEXT = b"GET /next-one HTTP/1.1\r\nHost: broker\r\nX-Request-Id: next\r\n\r\n"
"""What follows on the connection."""


class Running(NamedTuple):
    """A broker's process, and what is known of it."""

    broker: Broker
    secret: str

    @property
    def port(self) -> int:
        return int(self.broker.url.rpartition(":")[2])

    @property
    def admin_port(self) -> int:
        return int(self.broker.admin_url.rpartition(":")[2])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A broker with everything that can be served; nothing in here may be a defect of it."""
    folder = tmp_path_factory.mktemp("broker")
    tree = merged(
        good(folder),
        {
            "server.docs": True,
            "server.keep_alive": f"{KEEP_ALIVE:g}s",
            "server.trusted_proxies": ["127.0.0.1"],
            "admin.secret": secrets.token_urlsafe(24),
            "limits.fingerprint.burst": 100_000,
            "log.level": "debug",
        },
    )
    with Broker.configured(folder, tree) as broker:
        yield Running(broker, secret_in(str(folder / "web")))
        assert broker.events("broker.defect") == []


async def connected(port: int) -> Line:
    """Connect to a listener of the running broker."""
    return Line(*await asyncio.open_connection("127.0.0.1", port, limit=2**20))


async def ended(line: Line) -> bytes:
    """Return what still comes until the broker ends the connection."""
    async with asyncio.timeout(TIMEOUT):
        rest = await line.rest()
    await line.close()
    return rest


async def at_once(tries: list[Awaitable[str]]) -> None:
    """Do all of it side by side; what went wrong is told together."""
    assert [wrong for wrong in await asyncio.gather(*tries) if wrong] == []


def data_routes(running: Running) -> list[tuple[str, str]]:
    """Return method and path of every route that is documented, of others, and of none."""
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(request("GET", "/openapi.json", [("Connection", "close")]))
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    paths = json.loads(answer.partition(b"\r\n\r\n")[2])["paths"]
    documented = [(name.upper(), path) for path, kinds in paths.items() for name in kinds]
    assert len(documented) >= 7
    pages = ("/embed.js", "/embed.json", "/embed.d.ts", "/docs", "/docs/start.js", "/openapi.json")
    every = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND")
    more = [(method, path) for path in ("/", "/metrics", VERIFY, f"{VERIFY}/x") for method in every]
    off = [("DELETE", path) for _, path in documented] + [("HEAD", path) for path in pages]
    return [*documented, *more, *off, *(("GET", path) for path in (*pages, "/healthz", "/nowhere"))]


def admin_routes(_running: Running) -> list[tuple[str, str]]:
    """Return the same of the admin listener."""
    paths = ("/metrics", "/livez", "/health", "/readyz", "/v1/sessions", "/v1/sessions/x", "/x")
    return [(m, path) for path in paths for m in ("GET", "HEAD", "POST", "DELETE", "OPTIONS")]


LISTENERS = {"data": data_routes, "admin": admin_routes}


def port_of(running: Running, listener: str) -> int:
    """Return where a listener of that name is."""
    return running.port if listener == "data" else running.admin_port


def with_body(method: str, path: str, length: int | None, *more: tuple[str, str]) -> bytes:
    """Write the head of a request with a body of this length, in chunks if it has none."""
    framing = (
        ("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))
    )
    return request(method, path, [("X-Request-Id", "first"), framing, *more])


async def test_what_a_test_leaves_open_is_ended_after_it() -> None:
    """Else it is collected in a later test, and fails that."""
    async with await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        line, client = await connected(port), await _deaf(port)
        hang_up()
        assert line.writer.transport.is_closing()
        assert client.fileno() == -1


class TestUnreadBodies:
    """N3: what is sent as a body is never read as a request, whatever is answered before."""

    @pytest.mark.parametrize("listener", LISTENERS)
    @pytest.mark.parametrize(
        ("length", "more"),
        [
            (len(INSIDE), ()),
            (1, ()),
            (2**40, ()),
            (None, ()),
            (len(INSIDE), (("Expect", "100-continue"),)),
            (len(INSIDE), (("Content-Encoding", "gzip"),)),
        ],
        ids=["length", "a byte", "a terabyte", "chunked", "expect", "gzip"],
    )
    async def test_N3_an_answer_before_the_body_is_the_last_one(
        self, running: Running, listener: str, length: int | None, more: tuple[tuple[str, str], ...]
    ) -> None:
        """On every route: it says `Connection: close`, and nothing that follows is answered.

        As a proxy does that announces its client's body and does not send it: its next bytes
        are another client's request.
        """

        async def one(method: str, path: str) -> str:
            line = await connected(port_of(running, listener))
            line.send(with_body(method, path, length, *more))
            reply = await self._final(line, method)
            line.send(INSIDE + NEXT)
            rest = await ended(line)
            if reply.header("Connection") == "close" and rest == b"":
                return ""
            return f"{method} {path}: {reply.status} {reply.headers}, then {rest[:200]!r}"

        routes = LISTENERS[listener](running)
        await at_once([one(method, path) for method, path in routes])

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N3_a_body_that_came_with_its_head_keeps_the_connection(
        self, running: Running, listener: str
    ) -> None:
        """There is nothing left of it to be taken for a request: no connection is wasted."""

        async def one(method: str, path: str) -> str:
            line = await connected(port_of(running, listener))
            line.send(with_body(method, path, len(INSIDE)) + INSIDE)
            first = await self._final(line, method)
            line.send(NEXT)
            second = await line.answer()
            line.writer.write_eof()
            rest = await ended(line)
            good = (first.header("Connection"), second.status, rest) == (None, 404, b"")
            return "" if good else f"{method} {path}: {first}, then {second}, {rest!r}"

        routes = LISTENERS[listener](running)
        await at_once([one(method, path) for method, path in routes])

    async def test_N3_a_request_without_a_token_never_passes_as_another_one(
        self, running: Running
    ) -> None:
        """The holder of a token has a body announced that is the head of a good request."""
        token = await _token(running)
        uri = f"/x?token={token}"
        holder = with_body("GET", VERIFY, len(INSIDE), ("X-Original-URI", uri))
        stranger = request(
            "GET", VERIFY, [("X-Original-URI", "/secret"), ("X-Y", "GET / HTTP/1.0")]
        )
        line = await connected(running.port)
        line.send(holder)
        reply = await line.answer()
        assert (reply.status, reply.header("Connection")) == (200, "close")
        line.send(stranger)
        assert await ended(line) == b""
        line = await connected(running.port)
        line.send(stranger)
        assert (await line.answer()).status == 401
        await line.close()

    @pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.2", ""])
    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N3_what_follows_an_upgrade_is_read_whole_or_not_at_all(
        self, running: Running, listener: str, upgrade: str
    ) -> None:
        """A request that asks for another protocol, and a second one, cut anywhere.

        The parser drops what follows the first one in its packet; the rest of the second one
        must not be read as a request then.
        """
        requests = [("Connection", "Upgrade"), ("Upgrade", upgrade)]
        first = request("GET", "/livez", requests)
        second = b"GET /next-one HTTP/1.1\r\nX-A: GET /livez HTTP/1.1\r\nHost: broker\r\n\r\n"
        cut = second.index(b"GET /livez")

        async def one(at: int) -> str:
            line = await connected(port_of(running, listener))
            sent = first + second
            line.send(sent[:at])
            await line.writer.drain()
            reply = await line.answer()
            line.send(sent[at:])
            rest = await ended(line)
            good = reply.status == 200 and b'{"status":"ok"}' not in rest
            return "" if good else f"cut at {at}: {reply}, then {rest!r}"

        cuts = (len(first), len(first) + 1, len(first) + cut, len(first) + cut + 5)
        await at_once([one(at) for at in cuts])

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N3_a_connect_behind_other_requests_is_answered_after_them(
        self, running: Running, listener: str
    ) -> None:
        """It is the last of its connection, not those before it."""
        line = await connected(port_of(running, listener))
        line.send(request("GET", "/livez") * 2 + request("CONNECT", "broker:1") + b"GET / HTTP/1.1")
        answers = [await line.answer() for _ in range(3)]
        assert [answer.status for answer in answers[:2]] == [200, 200]
        assert answers[2].status // 100 == 4
        assert [answer.header("Connection") for answer in answers] == [None, None, "close"]
        assert await ended(line) == b""

    async def test_N3_a_client_that_asks_for_an_upgrade_keeps_its_connection(
        self, running: Running
    ) -> None:
        """Java's client asks for h2c in every request, with a body or without."""
        requests = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")]
        line = await connected(running.port)
        for body in (None, b"{}", b"", b"x" * 5000):
            line.send(request("POST", TOKEN_PATH, requests, body))
            reply = await line.answer()
            assert (reply.status, reply.header("Connection")) == (401, None)
        await line.close()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_N3_bytes_of_a_body_are_never_answered(
        self, running: Running, data: st.DataObject
    ) -> None:
        """Any route, framing and cut into packets: at most the two requests are answered.

        The first answer either ends the connection, or the second request is answered.
        """
        listener = data.draw(st.sampled_from(list(LISTENERS)))
        method, path = data.draw(st.sampled_from(LISTENERS[listener](running)))
        before, after = data.draw(st.binary(max_size=40)), data.draw(st.binary(max_size=40))
        body = before + INSIDE * data.draw(st.integers(1, 3)) + after
        chunked = data.draw(st.booleans())
        more = [
            *([("Expect", "100-continue")] if data.draw(st.booleans()) else []),
            *([("api-secret", running.secret)] if data.draw(st.booleans()) else []),
        ]
        head = with_body(method, path, None if chunked else len(body), *more)
        sent = head + (b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body) + NEXT
        cuts = sorted(data.draw(st.lists(st.integers(1, len(sent) - 1), max_size=4)))
        asyncio.run(self._require_no_third(port_of(running, listener), sent, cuts, method))

    async def _require_no_third(self, port: int, sent: bytes, cuts: list[int], method: str) -> None:
        """Send in pieces, read what is answered."""
        line = await connected(port)
        with suppress(ConnectionError):  # the broker may have ended it by now
            for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
                line.send(sent[start:end])
                await line.writer.drain()
                await asyncio.sleep(0)
        try:
            first = await self._final(line, method)
        except ConnectionError:  # this machine was too busy to send all of it within `LINGER`
            await line.close()
            return
        if first.header("Connection") is None:
            second = await line.answer()
            assert (second.status, second.header("Connection")) == (404, None)
        else:
            assert first.header("Connection") == "close"
        with suppress(OSError):
            line.writer.write_eof()
        assert await ended(line) == b""

    async def _final(self, line: Line, method: str) -> Reply:
        """Read an answer that is not 100."""
        while True:
            async with asyncio.timeout(TIMEOUT):
                head = await line.reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 100 "):
                break
        copy = asyncio.StreamReader()
        copy.feed_data(head)
        reply = await Line(copy, line.writer).answer(bodyless=True)
        length = int(reply.header("Content-Length") or "")
        body = b"" if method == "HEAD" else await line.reader.readexactly(length)
        return Reply(reply.status, reply.reason, reply.headers, body)


async def _token(running: Running) -> str:
    body = json.dumps({"agent_id": "A78WKV4515", "fingerprint": secrets.token_hex(16)}).encode()
    line = await connected(running.port)
    line.send(request("POST", TOKEN_PATH, [("api-secret", running.secret)], body))
    token = (await line.answer()).token
    await line.close()
    return token


HEADS: dict[str, list[tuple[str, str]]] = {
    "16 KB of cookies": [("Cookie", "; ".join(f"c{n}={'x' * 1000}" for n in range(16)))],
    "four cookie headers": [("Cookie", f"c{n}={'x' * 8000}") for n in range(4)],
    "a long referer": [("Referer", "https://shop.example/?" + "q" * 30_000)],
    "sixty headers": [(f"X-Forwarded-{n}", "y" * 500) for n in range(60)],
    "a line that just fits": [("X-A", "z" * (MAX_FIELD - 3))],
}


class TestOddTargets:
    """N2, N3: whatever a request names, somebody answers it or ends its connection."""

    @pytest.mark.parametrize("listener", LISTENERS)
    @pytest.mark.parametrize(
        "target", ["http://xn--a/livez", "http://xn--/", "https://xn--a:8/x?y"]
    )
    @pytest.mark.parametrize("before", [b"", request("GET", "/livez", [])], ids=["alone", "behind"])
    async def test_N2_a_host_that_cannot_be_read_is_refused(
        self, running: Running, listener: str, target: str, before: bytes
    ) -> None:
        """With the envelope; the connection ends, and the next one is served."""
        line = await connected(port_of(running, listener))
        line.send(before + request("GET", target, [("Host", "x")]))
        said = await ended(line)
        assert said.count(b"HTTP/1.1 ") == 1 + bool(before)
        assert b"HTTP/1.1 400 " in said
        assert target.encode() not in said

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N3_a_body_of_connect_is_no_request(
        self, running: Running, listener: str
    ) -> None:
        """It comes later, and finds nobody: a tunnel is not to be had here."""
        line = await connected(port_of(running, listener))
        line.send(request("CONNECT", "b:80", [("Content-Length", str(len(INSIDE)))]))
        assert (await line.answer()).status >= 400
        line.send(INSIDE)
        assert await ended(line) == b""

    async def test_N2_a_connection_ends_with_what_answers_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever that was: it is told, and no client waits for ever."""

        async def start(_connection: object) -> None:
            raise RuntimeError

        async with serving({}) as edge:
            edge.defects_expected = True
            monkeypatch.setattr(DataConnection, "start", start)
            line = await connected(int(edge.app.url.rpartition(":")[2]))
            line.send(request("GET", "/livez", []))
            assert await ended(line) == b""
            assert [e["event"] for e in edge.events("broker.defect")] == ["broker.defect"]


class TestHeads:
    """N5: what callers behind proxies send is read; more than that is refused by name."""

    @pytest.mark.parametrize("more", HEADS.values(), ids=HEADS)
    async def test_N5_the_heads_of_callers_behind_proxies_are_read(
        self, running: Running, more: list[tuple[str, str]]
    ) -> None:
        """Tokens, checks of them, probes and scrapes, in one packet and in many."""
        token = await _token(running)
        body = json.dumps({"agent_id": "A78WKV4515", "fingerprint": secrets.token_hex(16)}).encode()
        asked = [
            (
                running.port,
                request("POST", TOKEN_PATH, [("api-secret", running.secret), *more], body),
            ),
            (running.port, request("GET", VERIFY, [("X-Embed-Token", token), *more])),
            (running.port, request("GET", "/readyz", more)),
            (running.admin_port, request("GET", "/metrics", more)),
            (running.admin_port, request("GET", "/livez", more)),
        ]
        for port, raw_request in asked:
            line = await connected(port)
            for size in (len(raw_request), 1400):
                for start in range(0, len(raw_request), size):
                    line.send(raw_request[start : start + size])
                    await line.writer.drain()
                    await asyncio.sleep(0)
                assert (await line.answer()).status == 200
            await line.close()

    async def test_N5_heads_in_pieces_are_counted_one_by_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither their bytes nor their time goes on once one is whole: a connection stays good."""
        monkeypatch.setattr("broker.web.connection.HEAD_TIMEOUT", 3.0)
        raw_request = request("GET", "/livez", [("Cookie", "c" * (MAX_HEAD // 5))])
        async with serving() as edge:
            line = await connected(int(edge.app.url.rpartition(":")[2]))
            for _ in range(8):
                for piece in (raw_request[:9_000], raw_request[9_000:-2], raw_request[-2:]):
                    line.send(piece)
                    await asyncio.sleep(0.01)
                assert (await line.answer()).status == 200
            await asyncio.sleep(4.0)
            line.send(raw_request)
            assert (await line.answer()).status == 200
            await line.close()

    async def test_N5_a_long_target_is_read(self, running: Running) -> None:
        """Envoy appends the original URI to the check's path; nginx sends it in a header."""
        token = await _token(running)
        uri = f"/embed/A78WKV4515?state={'s' * 30_000}&token={token}"
        for raw_request in (
            request("GET", f"{VERIFY}{uri}"),
            request("GET", VERIFY, [("X-Original-URI", uri)]),
        ):
            line = await connected(running.port)
            line.send(raw_request)
            assert (await line.answer()).status == 200
            await line.close()

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N5_beyond_the_bounds_the_answer_says_so(
        self, running: Running, listener: str
    ) -> None:
        """A byte too long a line, too much in all, too many; also to one who sends on and on."""
        line_too_long = [("X-A", "z" * (MAX_FIELD + 1))]
        in_all = [(f"X-{n}", "z" * 1000) for n in range(66)]
        too_many = [(f"X-{n}", "z") for n in range(MAX_FIELDS)]
        heads = [request("GET", "/livez", more) for more in (line_too_long, in_all, too_many)]
        heads += [request("GET", "/" + "p" * MAX_FIELD)]
        heads += [heads[1] * 3, b"GET /livez HTTP/1.1\r\n" + b"X-A: %s\r\n" % (b"z" * 9000) * 60]
        for head in heads:
            line = await connected(port_of(running, listener))
            line.send(head)
            reply = await line.answer()
            assert reply.status == 431, head[:200]
            assert reply.code == "HEAD_TOO_LARGE"
            assert (reply.reason, reply.header("Connection")) == (
                "Request Header Fields Too Large",
                "close",
            )
            assert await ended(line) == b""

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N5_a_head_that_begins_behind_another_request_has_no_more_room(
        self, running: Running, listener: str
    ) -> None:
        """Half of it comes in the packet of the request before, the rest with its end."""
        half = b"".join(b"X-%d: %s\r\n" % (n, b"z" * 20_000) for n in range(3))
        line = await connected(port_of(running, listener))
        line.send(request("GET", "/livez") + b"GET /livez HTTP/1.1\r\nHost: broker\r\n" + half)
        assert (await line.answer()).status == 200
        line.send(half + b"\r\n")
        assert (await line.answer()).code == "HEAD_TOO_LARGE"
        assert await ended(line) == b""

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N5_what_came_before_a_head_that_is_too_large_is_answered_and_so_is_it(
        self, running: Running, listener: str
    ) -> None:
        """In one packet, and so that it comes while the one before is still being answered."""
        too_large = request("GET", "/livez", [(f"X-{n}", "z" * 1000) for n in range(66)])
        line = await connected(port_of(running, listener))
        line.send(request("GET", "/livez") * 2 + too_large + request("GET", "/livez"))
        answers = [await line.answer() for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 431]
        assert [answer.header("Connection") for answer in answers] == [None, None, "close"]
        assert await ended(line) == b""

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N5_heads_without_an_end_cost_no_memory(
        self, running: Running, listener: str
    ) -> None:
        """60 clients that never stop: each is let go, and takes little until then."""

        async def one() -> str:
            line = await connected(port_of(running, listener))
            line.send(b"GET /livez HTTP/1.1\r\nHost: broker\r\n")
            await _send_until_the_end(line, b"X-A: %s\r\n" % (b"z" * 16_000))
            return ""

        before = _resident(running)
        await at_once([one() for _ in range(60)])
        assert _resident(running) - before < 60 * 4 * MAX_HEAD

    async def test_N5_a_head_that_began_with_the_end_of_a_body_is_counted(self) -> None:
        """As a whole, though its first bytes came in a packet with those of a body."""
        cookies = [("Cookie", "c" * (MAX_HEAD // 3))] * 3
        async with serving() as edge:
            line = await edge.connect()
            line.send(request("GET", "/livez"))
            assert (await line.answer()).status == 200
            (ours,) = connections(edge.app.parts.server)
            head, end, body = edge.asking().partition(b"\r\n\r\n")
            large = request("GET", "/livez", cookies)
            half = len(large) // 2
            for piece in (head + end, body + large[:half], large[half:]):
                ours.data_received(piece)
            assert [(await line.answer()).status for _ in range(2)] == [200, 431]
            assert await ended(line) == b""

    def test_N5_the_bounds_are_those_that_are_documented(self) -> None:
        """What aiohttp is given, and what the message of a refusal says."""
        assert MAX_FIELD == 32 * 1024 < MAX_HEAD == 64 * 1024


async def _send_until_the_end(line: Line, piece: bytes) -> None:
    async with asyncio.timeout(TIMEOUT):
        with suppress(ConnectionError):
            while True:
                line.send(piece)
                await line.writer.drain()
    line.writer.transport.abort()
    await line.close()


def _resident(running: Running) -> int:
    """Return the broker's memory in bytes."""
    status = Path(f"/proc/{running.broker.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


class TestTime:
    """N4: every connection ends after its time, and none before."""

    async def test_N4_who_pipelines_and_reads_nothing_is_let_go(self, running: Running) -> None:
        """Whatever is left unsent, and however little: 100 clients, from none to 64 KiB and more.

        So are those who begin a head or a body and do not go on, and those who never begin.
        """
        answer = await _embed_script(running)
        clients = [socket.socket() for _ in range(100)]
        for client in clients:
            closing_later(client.close)
        before = await _open_connections(running)
        for n, client in enumerate(clients):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", running.port))
            client.setblocking(False)
            wanted = 2_300_000 + n * 40_000
            raw_request = request("GET", "/embed.js") * max(wanted // answer, 1)
            with suppress(BlockingIOError):
                client.sendall(raw_request)
        lines = []
        for port in (running.port, running.admin_port):
            for begun in (b"", b"GE", b"GET /livez HTTP/1.1\r\nHost: b\r\nX-A"):
                line = await connected(port)
                line.send(begun)
                lines.append(line)
        half = await connected(running.port)
        half.send(
            request("POST", TOKEN_PATH, [("api-secret", running.secret), ("Content-Length", "90")])
        )
        try:
            await asyncio.sleep(KEEP_ALIVE + 2)
            assert await _open_connections(running) - before > 10, "none was left with unsent bytes"
            assert [await ended(line) for line in lines] == [b""] * len(lines)
            assert (await half.answer()).status == 408
            assert await ended(half) == b""
            for _ in range(2):  # the bound is longer than what a test waits for at most
                with suppress(TimeoutError):
                    await until_true(lambda: _is_back_to(running, before))
            assert await _open_connections(running) <= before
        finally:
            for client in clients:
                client.close()

    @pytest.mark.parametrize("unread", [1, 100, 4_000, 30_000, 64_000, 300_000])
    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N4_any_number_of_unsent_bytes_ends_a_connection(
        self, monkeypatch: pytest.MonkeyPatch, listener: str, unread: int
    ) -> None:
        """As the last answer before the idle time, or while the connection is being closed."""
        monkeypatch.setattr("broker.web.connection.UNSENT_TIMEOUT", 0.5)
        async with serving() as edge:
            port = edge.port if listener == "data" else edge.admin_port
            for ending in (b"", b"Connection: close\r\n"):
                request = b"GET /livez HTTP/1.1\r\nHost: b\r\n" + ending + b"\r\n"
                client = await _deaf(port)
                connection, transport = await _end_of(edge, listener, client)
                transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDBUF, 1
                )
                _fill(transport)
                transport.write(b"x" * unread)
                assert connection.writing_paused
                await asyncio.get_running_loop().sock_sendall(client, request)
                await until(transport.is_closing)
                await until(partial(_is_gone, connection))
                client.close()

    async def test_N4_who_reads_at_last_gets_everything(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Late, but in time: 2,000 answers, in their order, on a connection that stays."""
        monkeypatch.setattr("broker.web.connection.UNSENT_TIMEOUT", TIMEOUT)
        async with serving() as edge:
            client = await _deaf(edge.port)
            connection, transport = await _end_of(edge, "data", client)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            for n in range(2000):
                client.sendall(request("GET", f"/{n}", [("X-Request-Id", f"n{n}")]))
            await until(lambda: connection.writing_paused)
            line = Line(*await asyncio.open_connection(sock=client))
            assert [(await line.answer()).header("X-Request-Id") for _ in range(2000)] == [
                f"n{n}" for n in range(2000)
            ]
            assert connection.transport is not None
            assert not connection.writing_paused
            assert connection._unsent_timer is None
            await line.close()

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N4_a_request_that_began_within_the_idle_time_is_answered(
        self, running: Running, listener: str
    ) -> None:
        """With its first byte before the end of that time, and the others after it."""
        line = await connected(port_of(running, listener))
        raw_request = request("GET", "/livez")
        for cut in (1, len(raw_request) - 1, 20):
            await asyncio.sleep(KEEP_ALIVE / 2)
            line.send(raw_request[:cut])
            await asyncio.sleep(KEEP_ALIVE)
            line.send(raw_request[cut:])
            assert (await line.answer()).status == 200
        began = time.monotonic()
        assert await ended(line) == b""
        assert time.monotonic() - began > KEEP_ALIVE / 2

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N4_a_request_that_came_in_time_to_a_busy_broker_is_answered(
        self, running: Running, listener: str
    ) -> None:
        """It stands still while the idle time ends: what the kernel has for it is read first."""
        line = await connected(port_of(running, listener))
        line.send(request("GET", "/livez"))
        assert (await line.answer()).status == 200
        running.broker.send(signal.SIGSTOP)
        try:
            line.send(request("GET", "/livez"))
            await line.writer.drain()
            await asyncio.sleep(KEEP_ALIVE + 0.5)
        finally:
            running.broker.send(signal.SIGCONT)
        assert (await line.answer()).status == 200
        assert await ended(line) == b""


async def _embed_script(running: Running) -> int:
    """Return the length of an answer with the script."""
    line = await connected(running.port)
    line.send(request("GET", "/embed.js", [("Connection", "close")]))
    length = len(await line.rest())
    await line.close()
    return length


async def _open_connections(running: Running) -> float:
    line = await connected(running.admin_port)
    line.send(request("GET", "/metrics", [("Connection", "close")]))
    text = (await line.rest()).decode()
    await line.close()
    return next(
        float(sample.split()[1])
        for sample in text.splitlines()
        if sample.startswith("broker_connections ")
    )


async def _is_back_to(running: Running, before: float) -> bool:
    return await _open_connections(running) <= before


def _is_gone(connection: DataConnection) -> bool:
    return connection.transport is None and connection._manager is None


async def _deaf(port: int) -> socket.socket:
    """Connect somebody with little room for what it does not read."""
    client = socket.socket()
    closing_later(client.close)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return client


async def _end_of(
    edge: Edge, listener: str, client: socket.socket
) -> tuple[DataConnection, asyncio.Transport]:
    """Find the broker's end of a connection."""
    opened: list[DataConnection] = []

    def look() -> bool:
        known = _connections(edge, listener)
        opened.extend(one for one in known if one.peername == client.getsockname())
        return bool(opened)

    await until(look)
    transport = opened[0].transport
    assert isinstance(transport, asyncio.Transport)
    return opened[0], transport


def _connections(edge: Edge, listener: str) -> list[Any]:
    if listener == "data":
        return edge.app.parts.server.connections
    assert edge.app._admin is not None
    served = edge.app._admin._runner.server
    assert served is not None
    return served.connections


def _fill(transport: asyncio.Transport) -> None:
    """Write until the kernel takes no more."""
    while transport.get_write_buffer_size() == 0:
        transport.write(b"x" * 512)


async def test_N4_half_a_head_behind_a_long_answer_has_its_time_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the answer is made nobody reads it; then it has to come like any other."""
    monkeypatch.setattr("broker.web.connection.HEAD_TIMEOUT", 0.2)
    async with serving({}) as edge:
        gate, mint = asyncio.Event(), edge.app.parts.issuer.mint

        async def slow(request: Any, turn: Any) -> Any:
            await gate.wait()
            return await mint(request, turn)

        edge.mint_by(slow)
        line = await connected(edge.port)
        line.send(edge.asking(secrets.token_hex(16)))
        await until(lambda: len(edge.app.parts.token_service.flights) == 1)
        line.send(b"GET /livez HTTP/1.1\r\nHost: a\r\n")
        await asyncio.sleep(0.5)  # longer than a head may take
        gate.set()
        assert (await line.answer()).status == 200
        assert await ended(line) == b""


class TestHalfClosed:
    """N3: a client that has sent its last byte is answered if that is soon, and not waited for.

    Both `nc -N`, which reads on, and a client that has gone send the same FIN.
    """

    @pytest.mark.parametrize("listener", LISTENERS)
    @pytest.mark.parametrize("count", [1, 3])
    async def test_N3_what_came_whole_before_the_end_is_answered(
        self, running: Running, listener: str, count: int
    ) -> None:
        """One request, or several behind each other; then the connection ends."""
        line = await connected(port_of(running, listener))
        line.send(request("GET", "/livez") * count)
        line.writer.write_eof()
        answers = [await line.answer() for _ in range(count)]
        assert [answer.status for answer in answers] == [200] * count
        assert await ended(line) == b""

    async def test_N3_so_is_a_token_asked_for_in_pieces(self, running: Running) -> None:
        """The end may come with the body or behind it; a mint is soon enough."""
        for pause in (0.0, 0.05):
            body = json.dumps({"agent_id": "A78WKV4515", "fingerprint": secrets.token_hex(16)})
            raw_request = request(
                "POST", TOKEN_PATH, [("api-secret", running.secret)], body.encode()
            )
            line = await connected(running.port)
            line.send(raw_request[:-5])
            await line.writer.drain()
            await asyncio.sleep(pause)
            line.send(raw_request[-5:])
            line.writer.write_eof()
            assert (await line.answer()).status == 200
            assert await ended(line) == b""

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N5_so_is_a_head_that_is_too_large(self, running: Running, listener: str) -> None:
        """What is refused is answered, too; and what is no request at all."""
        heads = {431: [(f"X-{n}", "z" * 1000) for n in range(66)], 400: [("X-A\0", "")]}
        for status, headers in heads.items():
            line = await connected(port_of(running, listener))
            line.send(request("GET", "/livez", headers))
            line.writer.write_eof()
            assert (await line.answer()).status == status
            assert await ended(line) == b""

    @pytest.mark.parametrize("listener", LISTENERS)
    @pytest.mark.parametrize(
        "part",
        [b"", b"GET /livez HTT", request("GET", "/livez")[:-2], request("GET", "/livez") + b"GET"],
        ids=["nothing", "a line", "a head", "behind an answer"],
    )
    async def test_N3_what_did_not_come_whole_is_not(
        self, running: Running, listener: str, part: bytes
    ) -> None:
        """Nothing can follow: the connection ends at once, not when its idle time does."""
        line = await connected(port_of(running, listener))
        line.send(part)
        line.writer.write_eof()
        rest = await ended(line)
        assert rest.count(b"HTTP/1.1 200 OK") == part.count(b"\r\n\r\n")

    @pytest.mark.parametrize("is_gone", [False, True], ids=["half-closed", "gone"])
    async def test_N3_whoever_must_be_waited_for_is_taken_for_gone(self, *, is_gone: bool) -> None:
        """A handler that goes on waiting is cancelled, and the connection ends."""
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def wait(_request: BaseRequest) -> StreamResponse:
            begun.set()
            try:
                await asyncio.sleep(10 * TIMEOUT)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            raise AssertionError

        open_now = Gauge([0.0], 0)
        serve = server.DataServer(wait, lambda: ("id", "date"), open_now, KEEP_ALIVE)
        loop = asyncio.get_running_loop()
        async with await loop.create_server(serve, "127.0.0.1", 0) as listening:
            line = await connected(listening.sockets[0].getsockname()[1])
            line.send(request("GET", "/"))
            await begun.wait()
            if is_gone:
                await line.close()
            else:
                line.writer.write_eof()
            async with asyncio.timeout(TIMEOUT):
                await cancelled.wait()
            if not is_gone:
                assert await ended(line) == b""
            await until(lambda: open_now.value == 0)
            await serve.shutdown(0)


class TestDrain:
    """O6: whose request may be on its way when the broker is told to stop is answered."""

    @pytest.mark.parametrize("came", [0, 20])
    @pytest.mark.parametrize("has_asked", [False, True])
    async def test_O6_a_request_that_may_be_on_its_way_is_awaited(
        self, monkeypatch: pytest.MonkeyPatch, came: int, *, has_asked: bool
    ) -> None:
        """With `came` bytes of its head at the broker; who has asked and is idle is not."""
        monkeypatch.setattr(server, "ON_ITS_WAY", TIMEOUT)
        asked, is_idle = request("GET", "/livez"), has_asked and not came
        async with serving() as edge:
            listening = edge.app.parts.server
            line = await edge.connect()
            if has_asked:
                line.send(asked)
                assert (await line.answer()).status == 200
            line.send(asked[:came])
            await until(lambda: [each.may_ask for each in connections(listening)] == [not is_idle])
            edge.app.parts.readiness.draining = True
            draining = asyncio.ensure_future(listening.drain(TIMEOUT))
            await asyncio.sleep(0)
            if not is_idle:
                line.send(asked[came:])
                answer = await line.answer()
                assert (answer.status, answer.header("Connection")) == (200, "close")
            assert await ended(line) == b""
            await draining

    @pytest.mark.parametrize("turns", range(4))
    async def test_O6_a_request_that_has_just_come_is_answered(self, turns: int) -> None:
        """Also one that nobody has taken yet, or that has just been taken, when a drain looks."""
        begun, may_end = asyncio.Event(), asyncio.Event()
        async with serving() as edge:
            listening, mint = edge.app.parts.server, edge.app.parts.issuer.mint

            async def slow(*asked: Any) -> Any:
                begun.set()
                await may_end.wait()
                return await mint(*asked)

            async def drain() -> None:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await listening.drain(TIMEOUT)

            edge.mint_by(slow)
            line = await edge.connect()
            line.send(request("GET", "/livez"))
            assert (await line.answer()).status == 200
            (ours,) = connections(listening)
            draining = asyncio.ensure_future(drain())
            ours.data_received(edge.asking())
            await begun.wait()
            await asyncio.wait([draining], timeout=0.2)  # it would have cut it off by then
            may_end.set()
            assert (await line.answer()).status == 200
            assert await ended(line) == b""
            await draining

    async def test_O6_who_is_idle_is_closed_while_others_are_answered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not kept, unread, until the last one is answered: a request on it would wait for that."""
        monkeypatch.setattr(bodies, "BODY_TIMEOUT", 2 * TIMEOUT)
        async with serving() as edge:
            listening, asked = edge.app.parts.server, edge.asking()
            idle, busy = await edge.connect(), await edge.connect()
            for line in (idle, busy):
                line.send(asked)
                assert (await line.answer()).status == 200
            busy.send(asked[:-1])
            await until(lambda: any(each.is_busy for each in connections(listening)))
            edge.app.parts.readiness.draining = True
            draining = asyncio.ensure_future(listening.drain(2 * TIMEOUT))
            assert await ended(idle) == b""
            assert not draining.done()
            busy.send(asked[-1:])
            answer = await busy.answer()
            assert (answer.status, answer.header("Connection")) == (200, "close")
            assert await ended(busy) == b""
            await draining

    async def test_O6_nobody_is_awaited_for_longer_than_that(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who never asks holds no drain."""
        monkeypatch.setattr(server, "ON_ITS_WAY", 0.0)
        async with serving() as edge:
            line = await edge.connect()
            await until(lambda: len(connections(edge.app.parts.server)) == 1)
            async with asyncio.timeout(TIMEOUT):
                await edge.app.parts.server.drain(2 * TIMEOUT)
            assert await ended(line) == b""


def connections(listening: server.DataServer) -> list[DataConnection]:
    """Return those that are open."""
    return [each for each in listening.connections if isinstance(each, DataConnection)]


class TestKeepAlive:
    """N8: how long a connection may be idle is a setting."""

    def test_N8_the_default_is_longer_than_common_balancers_keep_a_connection(self) -> None:
        """Nginx and AWS end theirs after 60 s: it is them who close."""
        assert Settings().server.keep_alive.seconds == 75

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N8_an_idle_connection_is_kept_for_that_time(
        self, running: Running, listener: str
    ) -> None:
        """Counted from each answer; one that was never used, from its begin."""
        used, unused = [await connected(port_of(running, listener)) for _ in "ab"]
        for _ in range(3):
            await asyncio.sleep(KEEP_ALIVE * 0.6)
            used.send(request("GET", "/livez"))
            assert (await used.answer()).status == 200
        answered = time.monotonic()
        assert await ended(unused) == b""
        assert await ended(used) == b""
        assert time.monotonic() - answered > KEEP_ALIVE * 0.9

    @pytest.mark.parametrize("written", ["1s", "620s", "650s", "1h"])
    def test_N8_the_times_of_balancers_are_taken(self, tmp_path: Path, written: str) -> None:
        """By the check of a configuration; what is not, is among those of test_config."""
        path = write(tmp_path / "b.toml", toml(put(good(tmp_path), "server.keep_alive", written)))
        assert run("check", "--config", path).returncode == 0

    async def test_N8_it_reaches_the_connections(self) -> None:
        """In seconds, on either listener."""
        async with serving({"server": {"keep_alive": "620s"}}) as edge:
            for listener in LISTENERS:
                client = await _deaf(edge.port if listener == "data" else edge.admin_port)
                connection, _ = await _end_of(edge, listener, client)
                assert connection.keepalive_timeout == 620
                client.close()

    @pytest.mark.parametrize("is_chunked", [False, True])
    async def test_N8_the_end_of_a_body_is_not_taken_for_a_head(
        self, monkeypatch: pytest.MonkeyPatch, *, is_chunked: bool
    ) -> None:
        """Head and body in packets of their own: what is idle then has all of its idle time.

        Another connection has begun a head and is ended after the time of heads; this one stays.
        """
        monkeypatch.setattr("broker.web.connection.HEAD_TIMEOUT", 0.3)
        async with serving() as edge:
            line = await edge.connect()
            await _answered_in_pieces(line, edge.asking(), is_chunked=is_chunked)
            slow = await edge.connect()
            slow.send(b"GET /livez HTTP/1.1\r\n")
            assert await ended(slow) == b""
            await _answered_in_pieces(line, edge.asking(), is_chunked=is_chunked)
            await line.close()

    def test_N8_a_change_of_it_needs_a_restart_and_a_reload_says_so(self, tmp_path: Path) -> None:
        """Connections that are open were made with the old one."""
        tree = good(tmp_path)
        with Broker.configured(tmp_path, tree) as broker:
            write(tmp_path / "broker.toml", toml(put(tree, "server.keep_alive", "620s")))
            assert broker.reload()["needs_restart"] == ["server"]
            write(tmp_path / "broker.toml", toml(put(tree, "server.keep_alive", "620")))
            failed = broker.reload()
            assert failed["event"] == "broker.reload_failed"
            assert failed["error"].startswith("server.keep_alive: a duration needs a number")


async def _answered_in_pieces(line: Line, request: bytes, *, is_chunked: bool) -> None:
    """Send a head, and only when it has been read the body of it, in several packets."""
    head, _, body = request.partition(b"\r\n\r\n")
    pieces = [body[:5], body[5:]]
    if is_chunked:
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
    line.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
    assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    for piece in pieces:
        line.send(piece)
        await asyncio.sleep(0.01)
    assert (await line.answer()).status == 200


class TestAdminListener:
    """N23: it is as strict as the data listener."""

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PROPFIND"])
    async def test_N23_no_answer_names_the_server(self, running: Running, method: str) -> None:
        """Good and bad, every route: the same head as on the data listener."""
        common = ["Content-Type", "Content-Length", "Cache-Control", "X-Content-Type-Options"]
        paths = ("/metrics", "/livez", "/readyz", "/v1/sessions", "/v1/sessions/x", "/x", "/x%00")
        for path in paths:
            line = await connected(running.admin_port)
            line.send(request(method, path))
            reply = await line.answer(bodyless=method == "HEAD")
            await line.close()
            names = [name for name, _ in reply.headers]
            assert names[:6] == [*common, "Date", "X-Request-Id"]
            assert set(names[6:]) <= {"Allow", "WWW-Authenticate"}
            assert reply.header("Cache-Control") == "no-store"
            if method != "HEAD" and reply.status != 200:
                assert reply.code

    @pytest.mark.parametrize("path", ["/metrics", "/livez", "/v1/sessions", "/nowhere"])
    async def test_N23_an_expectation_is_not_repeated(self, running: Running, path: str) -> None:
        """Refused or ignored, in the envelope; and no line of it in the log."""
        canary = secrets.token_hex(8)
        before = running.broker.log()
        for body in (None, b"x"):
            line = await connected(running.admin_port)
            line.send(request("GET", path, [("Expect", canary)], body))
            reply = await line.answer()
            await line.close()
            assert reply.status == 404 or (reply.status, reply.code) == (417, "VALIDATION_ERROR")
            assert canary not in reply.text
        assert running.broker.log() == before

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x"])
    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N23_encoded_bodies_are_left_as_they_are(
        self, running: Running, listener: str, encoding: str
    ) -> None:
        """Broken ones and good ones, whole and in pieces: an answer, and no line in the log."""
        before = running.broker.log()
        for content in (gzip.compress(b" " * 10**7), secrets.token_bytes(5000)):
            for path in ("/livez", "/metrics", "/v1/sessions", "/nowhere"):
                for pieces in (1, 2):
                    line = await connected(port_of(running, listener))
                    headers = [("Content-Encoding", encoding)]
                    raw_request = request("POST", path, headers, content)
                    half = len(raw_request) // pieces
                    line.send(raw_request[:half])
                    reply = await line.answer()
                    with suppress(ConnectionError):
                        line.send(raw_request[half:])
                        await line.writer.drain()
                    assert reply.status in (401, 404, 405)
                    assert reply.code
                    await line.close()
        assert running.broker.log() == before

    @pytest.mark.parametrize("listener", LISTENERS)
    async def test_N23_endless_bodies_cost_no_memory(self, running: Running, listener: str) -> None:
        """20 clients with a terabyte each: answered at once, and cut off after a second."""

        async def one() -> str:
            line = await connected(port_of(running, listener))
            line.send(request("POST", "/livez", [("Content-Length", str(2**40))]))
            await _send_until_the_end(line, b"x" * 65536)
            return ""

        before = _resident(running)
        await at_once([one() for _ in range(20)])
        assert _resident(running) - before < 20 * 2**20
