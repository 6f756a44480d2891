"""Answers as bytes: heads, limits in two generations of headers, and who does not read them."""

import asyncio
import re
import socket
from itertools import product

import pytest
from edge import Edge, closing_later, request, visitor
from hypothesis import given
from hypothesis import strategies as st

from broker.model import LimitName
from broker.rules.bucket import Limit, peek, spend
from broker.web.response import (
    JSON_TYPE,
    Answer,
    Heads,
    ReadyAnswer,
    head,
    limit_headers,
    retry_after_seconds,
)
from broker.web.server import DataServer

LIMITS = st.builds(Limit, st.integers(1, 2**31 - 1), st.integers(1, 3_600_000_000))
NOW = 1_800_000_000_000_000


def parsed(text: str) -> dict[str, str]:
    """Read header lines."""
    lines = text.removesuffix("\r\n").split("\r\n")
    return dict(line.split(": ", 1) for line in lines)


class TestRetryAfter:
    @given(st.integers(-(10**12), 10**12))
    def test_L9_whole_seconds_rounded_up_never_0(self, wait: int) -> None:
        """Who waits that long has waited long enough, and nobody is told to come at once."""
        seconds = retry_after_seconds(wait)
        assert seconds >= 1
        assert seconds * 1_000_000 >= wait
        assert seconds == 1 or (seconds - 1) * 1_000_000 < wait


class TestLimitHeaders:
    @given(LIMITS, st.integers(0, 10**16), st.sampled_from(LimitName))
    def test_L10_both_generations_say_the_same(
        self, limit: Limit, wait: int, name: LimitName
    ) -> None:
        """Limit, remaining and times agree with each other and with the next decision."""
        full_at, verdict = spend(NOW + wait, limit, NOW)
        headers = parsed(limit_headers(name, verdict, NOW))
        assert list(headers) == [
            "X-RateLimit-Limit",
            "RateLimit-Policy",
            "X-RateLimit-Remaining",
            "X-RateLimit-Reset",
            "RateLimit",
        ]
        remaining = int(headers["X-RateLimit-Remaining"])
        assert int(headers["X-RateLimit-Limit"]) == limit.burst
        assert 0 <= remaining <= limit.burst
        assert remaining == peek(full_at, limit, NOW).remaining
        window = -(-limit.burst * limit.interval // 1_000_000)
        assert headers["RateLimit-Policy"] == f'"{name.value}";q={limit.burst};w={window}'
        found = re.fullmatch(r'"(\w+)";r=(\d+);t=(\d+)', headers["RateLimit"])
        assert found is not None
        assert found[1] == name.value
        assert int(found[2]) == remaining
        reset = int(headers["X-RateLimit-Reset"])
        assert peek(full_at, limit, reset * 1_000_000).remaining == limit.burst
        later = NOW + int(found[3]) * 1_000_000
        assert peek(full_at, limit, later).remaining > remaining or remaining == limit.burst
        if not verdict.allowed:
            assert int(found[3]) == retry_after_seconds(verdict.retry_after)
            assert spend(full_at, limit, later)[1].allowed

    def test_a_full_bucket_has_no_next_token(self) -> None:
        """`t` is left out, as the draft has it, rather than 0."""
        headers = limit_headers(LimitName.CLIENT, peek(0, Limit(5, 1_000_000), NOW), NOW)
        assert parsed(headers)["RateLimit"] == '"client";r=5'


class TestHeads:
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([Limit(20, 1_000_000), Limit(1, 59), Limit(2**31 - 1, 3)]),
                st.integers(-5, 10**8),
                st.sampled_from(["Cache-Status: x; hit\r\n", "Cache-Status: x; fwd=miss\r\n"]),
                st.integers(0, 10**7),
                st.integers(0, 3),
                st.booleans(),
            ),
            max_size=8,
        )
    )
    def test_what_is_kept_is_what_the_parts_write(
        self, draws: list[tuple[Limit, int, str, int, int, bool]]
    ) -> None:
        """Byte for byte, whatever limit, line and second came before; full buckets, too."""
        heads, dates = Heads(), [f"second {number}" for number in range(4)]
        for limit, wait, line, length, second, is_peeked in draws:
            verdict = (
                peek(NOW + wait, limit, NOW) if is_peeked else spend(NOW + wait, limit, NOW)[1]
            )
            wall, date = NOW + second * 1_000_000 + wait % 999_999, dates[second]
            start = head(200, length, JSON_TYPE, f"id-{length}", date)
            expected = start + line + limit_headers(LimitName.FINGERPRINT, verdict, wall)
            written = heads.write(line, length, f"id-{length}", date, verdict, wall)
            assert written == expected.encode()
            if not verdict.allowed:
                start = head(429, length, JSON_TYPE, "id", date)
                told = start + limit_headers(LimitName.AGENT, verdict, wall)
                told += f"Retry-After: {retry_after_seconds(verdict.retry_after)}\r\n"
                refusal = heads.refusal(LimitName.AGENT, length, "id", date, verdict, wall)
                assert refusal == told.encode()

    def test_what_is_kept_holds_for_what_is_told_alike_only(self) -> None:
        """Within one second: other moments, limits, depths, outcomes and names."""
        heads, date = Heads(), "a second"
        limits = [Limit(20, 1_000_000), Limit(20, 2_000_000), Limit(3, 5_000_000)]
        limits += [Limit(1, 5_000_000), Limit(1, 7_000_000)]  # refused alike, but for their pace
        waits = (0, 600_000, 1_500_000, 3_600_000, 11_900_000, 12_900_000, 10**9)
        for limit, wait, part, line in product(
            limits, waits, (0, 500_000, 999_999), ("A\r\n", "B\r\n")
        ):
            verdict, wall = spend(NOW + wait, limit, NOW)[1], NOW + part
            start = head(200, wait, JSON_TYPE, "id", date) + line
            told = limit_headers(LimitName.FINGERPRINT, verdict, wall)
            assert heads.write(line, wait, "id", date, verdict, wall) == (start + told).encode()
            for name in (LimitName.AGENT, LimitName.CLIENT):
                told = head(429, 90, JSON_TYPE, "id", date) + limit_headers(name, verdict, wall)
                told += f"Retry-After: {retry_after_seconds(verdict.retry_after)}\r\n"
                refusal = heads.refusal(name, 90, "id", date, verdict, wall)
                assert verdict.allowed or refusal == told.encode()


class TestReadyAnswer:
    async def test_head_has_no_body_and_the_length_of_the_get(self, edge: Edge) -> None:
        """Also for errors; the next request on the connection is read rightly."""
        line = await edge.connect()
        for path in ("/livez", "/nowhere"):
            line.send(request("HEAD", path))
            reply = await line.answer(bodyless=True)
            assert int(reply.header("Content-Length") or "") > 0
        line.send(request("GET", "/livez"))
        assert (await line.answer()).json == {"status": "ok"}
        await line.close()

    async def test_one_write_for_one_answer(self, edge: Edge) -> None:
        """Head and body leave together: a second packet would wait for the first one's ACK."""
        line = await edge.connect()
        line.send(edge.asking())
        data = await line.reader.read(65536)
        assert data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert data.endswith(b"}}")
        await line.close()

    async def test_G6_who_pipelines_and_does_not_read_is_no_longer_answered(
        self, edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its answers do not pile up here, and after a while it is cut off (O4)."""
        monkeypatch.setattr("broker.web.connection.UNSENT_TIMEOUT", 5.0)
        client = socket.socket()
        closing_later(client.close)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", edge.port))
        assert (await edge.get("/livez")).status == 200  # by now the first one is accepted
        server = edge.app.parts.server
        transport = await _transport_of(server, client.getsockname())
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sending = asyncio.create_task(
            asyncio.get_running_loop().sock_sendall(client, request("GET", "/livez") * 5000)
        )
        seen, quiet = 0, 0
        async with asyncio.timeout(30):
            while quiet < 20:  # what is quiet with nothing to send waits for more requests
                await asyncio.sleep(0.002)
                is_full = transport.get_write_buffer_size() > 0
                quiet = quiet + 1 if is_full and server.requests_count == seen else 0
                seen = server.requests_count
        assert seen < 2500
        assert 0 < transport.get_write_buffer_size() < 4096  # one answer, and no second one
        assert (await edge.request_token()).status == 200
        async with asyncio.timeout(30):
            while server.connections:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.002)
        sending.cancel()
        await asyncio.wait([sending])
        client.close()
        assert transport.is_closing()

    def test_its_repr_tells_size_and_status_and_not_what_is_inside(self) -> None:
        """G7: the payload is a token."""
        body = visitor().encode()
        answer = ReadyAnswer(Answer(200, b"HTTP/1.1 200 OK\r\n", body))
        assert repr(answer) == f"ReadyAnswer(200, {len(body)} bytes)"


async def _transport_of(server: DataServer, peer: tuple[str, int]) -> asyncio.Transport:
    """Find the broker's end of a connection."""
    for connection in server.connections:
        transport = connection.transport
        if isinstance(transport, asyncio.Transport) and connection.peername == peer:
            return transport
    raise AssertionError(f"nobody is connected from {peer}")
