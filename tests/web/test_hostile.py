"""Requests that mean harm, byte by byte: a clean 4xx, in time, with nothing of them repeated."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from edge import AGENT, TOKEN_PATH, Edge, Line, Reply, request, serving, visitor

from broker.config.settings import Duration

BODY = b'{"agent_id":"a","fingerprint":"abcd"}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

HEAD = b"POST %s HTTP/1.1\r\nHost: broker\r\n" % TOKEN_PATH.encode()
SECRET = b"api-secret: SECRET\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
TE = b"Transfer-Encoding: chunked\r\n"

MALFORMED: dict[str, bytes] = {
    # two lengths of one body: the classic ways to smuggle a request past a proxy
    "length and chunked": HEAD + SECRET + LENGTH + TE + b"\r\n" + CHUNKED,
    "chunked and length": HEAD + SECRET + TE + LENGTH + b"\r\n" + CHUNKED,
    "two lengths": HEAD + SECRET + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "the same length twice": HEAD + SECRET + LENGTH + LENGTH + b"\r\n" + BODY,
    "a list of lengths": HEAD + SECRET + b"Content-Length: 37, 37\r\n\r\n" + BODY,
    "negative length": HEAD + SECRET + b"Content-Length: -1\r\n\r\n" + BODY,
    "signed length": HEAD + SECRET + b"Content-Length: +37\r\n\r\n" + BODY,
    "hexadecimal length": HEAD + SECRET + b"Content-Length: 0x25\r\n\r\n" + BODY,
    "empty length": HEAD + SECRET + b"Content-Length: \r\n\r\n" + BODY,
    "huge length": HEAD + SECRET + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "chunked twice": HEAD + SECRET + TE + TE + b"\r\n" + CHUNKED,
    "chunked not last": HEAD + SECRET + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + CHUNKED,
    "unknown coding": HEAD + SECRET + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
    "identity coding": HEAD + SECRET + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    # one header that two parsers read differently
    "folded header": HEAD + SECRET + b"X-A: CANARY\r\n more\r\n" + LENGTH + b"\r\n" + BODY,
    "folded first header": HEAD + b" X-A: CANARY\r\n" + SECRET + LENGTH + b"\r\n" + BODY,
    "space before colon": HEAD + SECRET + b"X-A : CANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "no colon": HEAD + SECRET + b"CANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "no name": HEAD + SECRET + b": CANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "bare LF in a header": HEAD + SECRET + b"X-A: CANARY\n" + LENGTH + b"\r\n" + BODY,
    "bare LF everywhere": (HEAD + SECRET + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "bare CR": HEAD + SECRET + b"X-A: a\rCANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL in a value": HEAD + SECRET + b"X-A: \0CANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "escape in a value": HEAD + SECRET + b"X-A: \x1b[31mCANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "escape in a name": HEAD + SECRET + b"X-\x1b: CANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "bidi in a name": HEAD + SECRET + b"X-\xe2\x80\xae: CANARY\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL in the secret": HEAD + b"api-secret: SECRET\0\r\n" + LENGTH + b"\r\n" + BODY,
    "two hosts": HEAD + b"Host: CANARY\r\n" + SECRET + LENGTH + b"\r\n" + BODY,
    "no host": (HEAD + SECRET + LENGTH + b"\r\n").replace(b"Host: broker\r\n", b"") + BODY,
    # not HTTP at all, or not enough of it
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03CANARY\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": b"BREW /CANARY HTTP/1.1\r\nHost: broker\r\n\r\n",
    "escape in the path": b"GET /\x1b[31mCANARY HTTP/1.1\r\nHost: broker\r\n\r\n",
    "bidi in the path": b"GET /\xe2\x80\xaeCANARY HTTP/1.1\r\nHost: broker\r\n\r\n",
    "NUL in the path": b"GET /\0CANARY HTTP/1.1\r\nHost: broker\r\n\r\n",
    "no target": b"CONNECT \nX-A: CANARY\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: CANARY\r\n\r\n",
    "no version": b"GET /CANARY HTTP\r\nHost: broker\r\n\r\n",
}


LONG = b"CANARY" * 6000
"""More than one line of a head may have."""

TOO_LARGE: dict[str, bytes] = {
    "too long a path": b"GET /%s HTTP/1.1\r\nHost: broker\r\n\r\n" % LONG,
    "too long a value": HEAD + SECRET + b"X-A: %s\r\n\r\n" % LONG,
    "too long a name": HEAD + SECRET + b"X-%s: a\r\n\r\n" % LONG,
    "too many headers": HEAD + SECRET + b"X-A: CANARY\r\n" * 200 + LENGTH + b"\r\n" + BODY,
    "too much in all": HEAD
    + SECRET
    + (b"X-A: %s\r\n" % LONG[:30_000]) * 3
    + LENGTH
    + b"\r\n"
    + BODY,
    "too much without an end": HEAD + SECRET + (b"X-A: %s\r\n" % LONG[:30_000]) * 3,
    "a target without an end": b"GET /%s" % LONG,
}

NOT_HTTP = "request: not valid HTTP/1.1; send a well-formed request"
HEAD_TOO_LARGE = (
    "request head: more than 32768 bytes in one line, 65536 in all or 128 headers; send fewer"
    " cookies, or let the proxy in front drop what the broker does not need"
)


class TestMalformed:
    @pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
    async def test_O3_is_a_clean_400_and_the_end(self, edge: Edge, data: bytes) -> None:
        """The envelope with every header; the connection ends; nothing of it anywhere."""
        await self._refused(edge, data, 400, "VALIDATION_ERROR", NOT_HTTP)

    @pytest.mark.parametrize("data", TOO_LARGE.values(), ids=TOO_LARGE)
    async def test_O3_too_large_a_head_is_a_clean_431_and_the_end(
        self, monkeypatch: pytest.MonkeyPatch, data: bytes
    ) -> None:
        """The same for what is too long: the answer says so, and what the bounds are."""
        monkeypatch.setattr("broker.web.connection.LINGER", 0.05)
        async with serving() as edge:
            await self._refused(edge, data, 431, "HEAD_TOO_LARGE", HEAD_TOO_LARGE)

    async def _refused(self, edge: Edge, data: bytes, status: int, code: str, message: str) -> None:
        canary = secrets.token_hex(16)
        sent = data.replace(b"CANARY", canary.encode()).replace(b"SECRET", edge.secret.encode())
        before = edge.log.getvalue()
        line = await edge.connect()
        line.send(sent + request("GET", "/livez"))
        reply = await line.answer()
        assert await line.rest() == b""
        await line.close()
        request_id = reply.header("X-Request-Id")
        assert reply.json == {
            "success": False,
            "status": "error",
            "status_code": status,
            "error": {"code": code, "message": message, "httpStatus": status},
        }
        assert [name for name, _ in reply.headers] == [
            "Content-Type",
            "Content-Length",
            "Cache-Control",
            "X-Content-Type-Options",
            "Date",
            "X-Request-Id",
            "Connection",
        ]
        assert (reply.status, reply.header("Connection")) == (status, "close")
        assert request_id is not None
        assert canary not in reply.text
        assert edge.secret not in reply.text
        assert edge.log.getvalue() == before
        assert (await edge.request_token()).status == 200

    async def test_O3_a_bad_request_ends_a_connection_that_was_good_so_far(
        self, edge: Edge
    ) -> None:
        """What was answered stays answered; what follows the bad one is never read."""
        line = await edge.connect()
        for _ in range(3):
            line.send(edge.asking())
            assert (await line.answer()).status == 200
        line.send(b"nonsense\r\n\r\n" + edge.asking())
        assert (await line.answer()).status == 400
        assert await line.rest() == b""
        await line.close()
        assert (await edge.scrape())['broker_requests_total{outcome="minted"}'] == 3

    async def test_O0_an_upgrade_is_declined_by_an_ordinary_answer(self, edge: Edge) -> None:
        """No switch of protocols, and what follows is no second request's business."""
        headers = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
        reply = await edge.raw(request("GET", "/livez", headers))
        assert (reply.status, reply.json) == (200, {"status": "ok"})

    async def test_O3_nothing_is_proxied(self, edge: Edge) -> None:
        """CONNECT and absolute URLs lead nowhere."""
        for line in (b"CONNECT other:443 HTTP/1.1", b"GET http://other/x HTTP/1.1"):
            reply = await edge.raw(line + b"\r\nHost: other\r\n\r\n")
            assert (reply.status, reply.code) == (404, "NOT_FOUND")
            assert "other" not in reply.text


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"[" * 8192,
            b'{"a":' * 1600,
            b'{"agent_id":"a","fingerprint":"abcd","x":NaN}',
            b'{"agent_id":"a","fingerprint":"\\ud800abcd"}',
            b'{"agent_id":"a","fingerprint":"abcd\\u0000"}',
            b'{"agent_id":"a","fingerprint":"ab\0cd"}',
            b'{"agent_id":"a\r\nX-Evil: 1","fingerprint":"abcd"}',
            b'{"agent_id":"a\\r\\nX-Evil: 1","fingerprint":"abcd"}',
            b"\0" * 8192,
            b"\xff" * 8192,
            os.urandom(4096),
        ],
        ids=range(11),
    )
    async def test_O3_are_a_clean_400(self, edge: Edge, body: bytes) -> None:
        """Deep nesting, NaN, lone surrogates, NUL, noise: 400 in the envelope."""
        reply = await edge.post(body)
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert reply.header("X-Evil") is None

    async def test_O3_deep_nesting_is_refused_or_ignored(self, edge: Edge) -> None:
        """By how deep the interpreter's stack goes (3.13 has more of it), never a defect."""
        body = b'{"agent_id":"a","fingerprint":"abcd","x":' + b"[" * 4000 + b"]" * 4000 + b"}"
        reply = await edge.post(body)
        assert reply.status == 200 or reply.code == "VALIDATION_ERROR"

    async def test_O3_a_gigabyte_of_chunks_costs_no_memory(
        self, edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sender that never stops is told 413, and is cut off long before its end."""
        monkeypatch.setattr("broker.web.connection.LINGER", 0.03)
        line = await edge.connect()
        head = request(
            "POST", TOKEN_PATH, [("api-secret", edge.secret), ("Transfer-Encoding", "chunked")]
        )
        line.send(head)
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        before = _resident()
        sent = 0
        with suppress(ConnectionError):
            for _ in range(16384):
                line.send(chunk)
                await line.writer.drain()
                sent += 1
        assert sent < 16384
        line.writer.transport.abort()
        assert _resident() - before < 64 * 2**20
        assert (await edge.request_token()).status == 200

    async def test_O3_a_refused_stranger_cannot_make_us_read_for_long(
        self, edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """401 at once; the rest of the body is read for `LINGER`, then the connection ends."""
        monkeypatch.setattr("broker.web.connection.LINGER", 0.05)
        line = await edge.connect()
        headers = [("api-secret", "x" * 20), ("Content-Length", str(2**30))]
        line.send(request("POST", TOKEN_PATH, headers) + b"x" * 1000)
        reply = await line.answer()
        assert (reply.status, reply.code) == (401, "UNAUTHORIZED")
        assert await line.rest() == b""
        await line.close()


def _resident() -> int:
    """Return this process's memory in bytes."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - not a file of ours
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


HALF_HEAD = HEAD + b"api-sec"


class TestSlowSockets:
    @pytest.fixture
    async def impatient(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Edge]:
        """A broker whose patience has been cut to a fraction of a second."""
        monkeypatch.setattr(
            "broker.config.validate.KEEP_ALIVE_BOUNDS", (Duration(0), Duration(10**6))
        )
        monkeypatch.setattr("broker.web.connection.HEAD_TIMEOUT", 0.05)
        monkeypatch.setattr("broker.web.connection.LINGER", 0.05)
        monkeypatch.setattr("broker.web.body.BODY_TIMEOUT", 0.05)
        async with serving({"server": {"keep_alive": "50ms"}}) as edge:
            yield edge

    async def test_O4_500_slow_sockets_do_not_hurt_good_traffic(self, edge: Edge) -> None:
        """Silent ones, half heads, half bodies, one byte at a time: others are answered."""
        kinds: list[bytes] = [b"", b"P", HALF_HEAD, edge.asking()[:-5]]
        lines = await asyncio.gather(*(edge.connect() for _ in range(500)))
        for n, line in enumerate(lines):
            line.send(kinds[n % len(kinds)])
        for _ in range(5):
            for n, line in enumerate(lines):
                line.send(b"x" if n % len(kinds) == 2 else b"")
            replies = await edge.all_at_once(edge.asking() for _ in range(20))
            assert {reply.status for reply in replies} == {200}
        assert len(edge.app.parts.server.connections) >= 500
        assert not any(line.reader.at_eof() for line in lines)
        await _hang_up(lines)

    async def test_O4_silent_sockets_and_half_heads_are_closed_in_time(
        self, impatient: Edge
    ) -> None:
        """However the bytes trickle: time counts from the head's first byte, not from the last."""
        lines = [await impatient.connect() for _ in range(30)]
        lines[0].send(HALF_HEAD)
        async with asyncio.timeout(30):
            trickling = asyncio.create_task(_trickle(lines[1], HEAD + b"X-A: " + b"a" * 10_000))
            assert [await line.rest() for line in lines] == [b""] * 30
            await trickling
        await _hang_up(lines)

    async def test_O4_half_bodies_are_closed_in_time(self, impatient: Edge) -> None:
        """However the bytes trickle: 408, then the end."""
        lines = [await impatient.connect() for _ in range(10)]
        for line in lines:
            line.send(impatient.asking()[:-5])
        announced = [("api-secret", impatient.secret), ("Content-Length", "8000")]
        async with asyncio.timeout(30):
            head = request("POST", TOKEN_PATH, announced)
            trickling = asyncio.create_task(_trickle(lines[0], head + b" " * 7000))
            replies = [await line.answer() for line in lines[1:]]
            assert {reply.status for reply in replies} == {408}
            assert [await line.rest() for line in lines[1:]] == [b""] * 9
            await trickling
        await _hang_up(lines)

    async def test_O4_an_idle_connection_is_kept_for_a_while_and_then_closed(
        self, impatient: Edge
    ) -> None:
        """After an answer the clock starts anew."""
        line = await impatient.connect()
        for _ in range(3):
            line.send(impatient.asking())
            assert (await line.answer()).status == 200
        async with asyncio.timeout(30):
            assert await line.rest() == b""
        await line.close()

    async def test_O0_a_handler_whose_client_is_gone_is_cancelled(self, edge: Edge) -> None:
        """Its mint, still queued for the budget, is given up: nobody needs it."""
        started, ended = asyncio.Event(), asyncio.Event()

        async def wait_for_a_turn(*_args: object) -> object:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        edge.mint_by(wait_for_a_turn)
        line = await edge.connect()
        line.send(edge.asking())
        async with asyncio.timeout(30):
            await started.wait()
            line.writer.transport.abort()
            await ended.wait()
            await edge.app.parts.token_service.flights.drained()
        assert len(edge.app.parts.token_service.flights) == 0
        assert edge.events("broker.embed_token") == []


async def _trickle(line: Line, data: bytes) -> None:
    """Send a byte at a time until the broker has had enough."""
    for n in range(len(data)):
        line.send(data[n : n + 1])
        try:
            await line.writer.drain()
        except ConnectionError:
            return
        if line.reader.at_eof():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the broker waited for all of it")


async def _hang_up(lines: list[Line]) -> None:
    for line in lines:
        line.writer.transport.abort()
    await asyncio.gather(*(line.close() for line in lines))


NASTY = {
    "CR LF": "a\r\nX-Evil: 1\r\n\r\n{}",
    "LF": 'a\n{"event":"forged"}',
    "ANSI": "\x1b[2J\x1b[31mred",
    "bidi": "\u202egnp.exe\u2066",
    "line separators": "a\u2028b\u2029c\x85d\x0be",
    "NUL": "a\0b",
    "DEL": "a\x7fb",
    "quotes": "\"'`{}%s${x}",
    "wide": "\U0001f4a5\U000e0041",
}


def _in_header(name: str) -> Callable[[Edge, str], bytes]:
    def write(edge: Edge, text: str) -> bytes:
        return edge.asking(headers=[(name, text)])

    return write


PLACES: dict[str, Callable[[Edge, str], bytes]] = {
    "agent": lambda edge, text: edge.asking(agent=text),
    "fingerprint": lambda edge, text: edge.asking(text),
    "model": lambda edge, text: edge.asking(model=text),
    "fresh": lambda edge, text: edge.asking(fresh=text),
    "unknown field": lambda edge, text: edge.asking(**{text: text}),
    "body": lambda edge, text: edge.posting(text.encode()),
    "secret": lambda edge, text: edge.asking(secret=text),
    "path": lambda _edge, text: request("POST", f"/{text}"),
    "query": lambda edge, text: edge.asking(path=f"{TOKEN_PATH}?{text}"),
    "method": lambda _edge, text: request(text, "/livez"),
    "request id": _in_header("X-Request-Id"),
    "forwarded for": _in_header("X-Forwarded-For"),
    "user agent": _in_header("User-Agent"),
    "origin": _in_header("Origin"),
    "traceparent": _in_header("traceparent"),
}


@pytest.mark.parametrize("form", ["json", "console"])
async def test_O9_every_input_with_nasty_characters_is_at_most_one_escaped_line(form: str) -> None:
    """Nothing forges a log line or paints the operator's terminal, nothing splits an answer."""
    limits = {"fingerprint_format": "any", "fingerprint": {"burst": 10_000}}
    tree = {"limits": limits, "server": {"trusted_proxies": ["127.0.0.1"]}}
    async with serving(tree, form=form) as edge:
        for text in NASTY.values():
            for write in PLACES.values():
                before = edge.log.getvalue()
                reply = await edge.raw(write(edge, text))
                assert reply.status < 500
                assert reply.header("X-Evil") is None
                assert b"forged" not in reply.body
                added = edge.log.getvalue().removeprefix(before)
                assert added.count("\n") <= 1
                _require_plain(added, form)
                edge.time.advance(60)
        assert edge.log.getvalue().count("\n") > 50
        assert "forged" not in edge.log.getvalue()


def _require_plain(text: str, form: str) -> None:
    lines = text.removesuffix("\n")
    assert lines == "" or (lines.isascii() and lines.isprintable()), ascii(text)
    if form == "json" and lines:
        assert isinstance(json.loads(lines), dict)


async def test_a_hundred_hostile_neighbours_do_not_disturb_an_honest_visitor(edge: Edge) -> None:
    """Bad requests of every kind at once; the honest one among them gets its token."""
    fingerprint = visitor()
    bad = [data.replace(b"SECRET", edge.secret.encode()) for data in MALFORMED.values()] * 3
    asking = asyncio.create_task(edge.all_at_once([edge.asking(fingerprint)] * 10))
    replies: list[Reply] = await edge.all_at_once(bad)
    assert {reply.status for reply in replies} == {400}
    good = await asking
    assert {reply.status for reply in good} == {200}
    assert len({reply.token for reply in good}) == 1
    assert good[0].json["data"]["token"]
    assert AGENT not in edge.log.getvalue().replace(f'"agent": "{AGENT}"', "")
