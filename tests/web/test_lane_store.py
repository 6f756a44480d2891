"""The fast lane on a shared store: what happens while a visit waits for its reply.

The server is a real one, which the tests let hang: so a request is pending as long as they like.
"""

import asyncio
import gc
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from edge import Edge, Line, Reply, request, serving, visitor
from servers import StoreServer, store_server, valkey_binary

from broker.app.wiring import NO_LANE
from broker.clock import SystemClock
from broker.model import TokenRequest
from broker.tasks import Later
from broker.valkey.near_cache import NearCache
from broker.valkey.visits import Visits
from broker.web.lane_connection import LaneConnection

pytestmark = pytest.mark.parts

TIMEOUT = 60.0
KEY = secrets.token_urlsafe(48)

VISITS = 'broker_store_duration_seconds_count{operation="visit"}'

Served = tuple[Edge, Line, LaneConnection]


@pytest.fixture(autouse=True)
def _with_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NO_LANE, raising=False)


@pytest.fixture
def server() -> Iterator[StoreServer]:
    """A server of the test's own: it hangs, or is killed."""
    with store_server(valkey_binary()) as server:
        yield server


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note each request that aiohttp's loop is given."""
    taken: list[bool] = []
    queue = LaneConnection._queue

    def noted(self: LaneConnection, *asked: Any) -> None:
        taken.append(True)
        queue(self, *asked)

    monkeypatch.setattr(LaneConnection, "_queue", noted)
    return taken


@asynccontextmanager
async def served(server: StoreServer, timeout: float = 60, **store: Any) -> AsyncIterator[Served]:
    """Serve from this store: a broker, a connection that has had a minted token, our end of it.

    `timeout` is seconds for a call: more than can be configured, because machines are noisy.
    """
    tree = {
        "store": {"url": server.url, "encryption_key": KEY, "timeout": "2s", **store},
        "limits": {"fingerprint": {"rate": 1, "per": "10m", "burst": 20}},
        "server": {"listen": "127.0.0.1:0", "drain": "30s", "drain_lead": "0s"},
    }
    async with serving(tree, clock=SystemClock()) as edge:
        _link(edge)._timeout = timeout
        line = await edge.connect()
        for status in ("fwd=miss", "hit"):
            line.send(edge.asking(VISITOR))
            reply = await line.answer()
            assert reply.cache_status == f"embed-token-broker; {status}"
        (ours,) = edge.app.parts.server.connections
        assert isinstance(ours, LaneConnection)
        yield edge, line, ours
        await line.close()


VISITOR = visitor()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def pending(server: StoreServer, edge: Edge, line: Line, ours: LaneConnection) -> Any:
    """Ask while the server hangs; it goes on afterwards."""
    server.pause()
    try:
        line.send(edge.asking(VISITOR))
        await until(lambda: ours._later is not None)
        assert ours.is_busy
        yield
    finally:
        server.resume()


def is_hit(reply: Reply) -> bool:
    """Whether the token came from the cache."""
    return reply.cache_status == "embed-token-broker; hit"


async def reused(edge: Edge) -> float:
    """Return how many requests were counted so."""
    return (await edge.scrape())['broker_requests_total{outcome="reused"}']


async def test_hits_are_answered_where_the_reply_arrives(
    server: StoreServer, queued: list[bool]
) -> None:
    """No task of aiohttp's takes them; each is counted once, with its own id, and charged once."""
    async with served(server) as (edge, line, ours):
        queued.clear()
        before, left = await reused(edge), ours._manager.requests_count  # type: ignore[union-attr]
        calls = (await edge.scrape())[VISITS]
        ids, remaining = set(), []
        for _ in range(5):
            line.send(edge.asking(VISITOR))
            reply = await line.answer()
            assert is_hit(reply)
            ids.add(reply.header("X-Request-Id"))
            remaining.append(int(reply.header("X-RateLimit-Remaining") or ""))
        assert queued == []
        assert len(ids) == 5
        assert remaining == [17, 16, 15, 14, 13]
        assert await reused(edge) == before + 5
        assert (await edge.scrape())[VISITS] == calls + 5
        assert ours._manager is not None
        assert ours._manager.requests_count == left + 5
        assert not ours.is_busy


@pytest.mark.parametrize("end", ["theirs", "ours"])
async def test_one_who_leaves_meanwhile_is_forgotten(server: StoreServer, end: str) -> None:
    """Charged once, answered to nobody, counted as no request; nothing of it stays.

    The connection is lost at once where our end gives it up; a client's end may be told before.
    """
    async with served(server) as (edge, line, ours):
        before = await reused(edge)
        async with pending(server, edge, line, ours):
            transport = line.writer.transport if end == "theirs" else ours.transport
            assert transport is not None
            transport.abort()
            await until(lambda: ours.transport is None and not ours.is_busy)
            assert ours._later is None
        await until(lambda: _rests(edge))
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, Later)]
        assert await reused(edge) == before
        assert not edge.app.parts.server.connections
        reply = await edge.request_token(VISITOR)
        assert reply.header("X-RateLimit-Remaining") == "16"  # the 4th request of 20


async def test_an_idle_connection_holds_no_request(server: StoreServer) -> None:
    """Neither one that was answered in time, nor one that aiohttp was given, nor a lost one."""
    async with served(server) as (edge, line, ours):
        assert ours._asked is None
        line.send(edge.asking(VISITOR, headers=[("X-Number", "1")]))  # a head that is not known
        assert is_hit(await line.answer())
        assert ours._asked is None
        async with pending(server, edge, line, ours):
            line.send(request("GET", "/livez"))
            await until(lambda: ours._later is None)
            assert ours._asked is None
        assert [(await line.answer()).status for _ in range(2)] == [200] * 2
        other = await edge.connect()
        other.send(edge.asking(VISITOR))
        assert is_hit(await other.answer())
        (theirs,) = (each for each in _connections(edge) if each is not ours)
        async with pending(server, edge, other, theirs):
            other.writer.transport.abort()
            await until(lambda: theirs.transport is None)
            assert theirs._asked is None


async def test_a_connection_takes_any_number_of_heads(server: StoreServer) -> None:
    """The parser is told of each that was answered: it stops at a number that wait."""
    async with served(server) as (edge, line, _):
        for number in range(100):
            line.send(edge.asking(VISITOR, headers=[("X-Number", str(number))]))
            assert (await line.answer()).status == (200 if number < 18 else 429)
        line.send(request("GET", "/livez") * 2)
        async with asyncio.timeout(TIMEOUT):
            assert [(await line.answer()).status for _ in range(2)] == [200] * 2


async def test_one_who_leaves_before_a_mint_has_none_made(server: StoreServer) -> None:
    """Nobody waits for the token that the store says is not there."""
    async with served(server) as (edge, line, ours):
        stranger = visitor()
        server.pause()
        line.send(edge.asking(stranger))
        await until(lambda: ours._later is not None)
        line.writer.transport.abort()
        await until(lambda: ours.transport is None)
        server.resume()
        await until(lambda: _rests(edge))
        await edge.app.parts.token_service.flights.drained()
        reply = await edge.request_token(stranger)
        assert reply.cache_status == "embed-token-broker; fwd=miss"


async def test_who_asks_on_is_answered_in_order(server: StoreServer, queued: list[bool]) -> None:
    """Requests that come while one is pending: it goes aiohttp's way, they wait behind it."""
    async with served(server) as (edge, line, ours):
        queued.clear()
        async with pending(server, edge, line, ours):
            line.send(request("GET", "/livez") + edge.asking("no hex") + edge.asking(VISITOR))
            await until(lambda: ours._later is None)
            assert ours.is_busy or ours._messages
        assert is_hit(await line.answer())
        assert (await line.answer()).json == {"status": "ok"}
        assert (await line.answer()).code == "VALIDATION_ERROR"
        last = await line.answer()
        assert is_hit(last)
        assert last.header("X-RateLimit-Remaining") == "16"
        assert queued == [True]


async def test_half_a_request_behind_it_is_read_on(server: StoreServer) -> None:
    """The parser gets what comes, byte for byte."""
    async with served(server) as (edge, line, ours):
        data = edge.asking(VISITOR)
        async with pending(server, edge, line, ours):
            line.send(data[:-20])
            await until(lambda: ours._later is None)
        assert is_hit(await line.answer())
        line.send(data[-20:])
        assert is_hit(await line.answer())
        line.send(data)
        assert is_hit(await line.answer())


async def test_who_ends_their_half_is_answered(server: StoreServer) -> None:
    """As one whose request waits in a task is."""
    async with served(server) as (edge, line, ours):
        async with pending(server, edge, line, ours):
            line.writer.write_eof()
            await until(lambda: ours._later is None)
        assert is_hit(await line.answer())
        assert await line.rest() == b""


async def test_the_end_of_the_idle_time_waits_for_it(server: StoreServer) -> None:
    """A connection with a pending request is not idle."""
    async with served(server) as (edge, line, ours):
        async with pending(server, edge, line, ours):
            ours._next_keepalive_close_time = 0.0
            ours._close_if_idle()
        assert is_hit(await line.answer())
        line.send(edge.asking(VISITOR))
        assert is_hit(await line.answer())


async def test_SIGTERM_lets_it_be_answered(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the signal begins is a drain: the answer says that it is the last one."""
    async with served(server) as (edge, line, ours):
        async with pending(server, edge, line, ours):
            edge.app.stop()
            end = asyncio.create_task(edge.app.run())
            await until(lambda: edge.app.parts.readiness.draining)
            await asyncio.sleep(0.1)  # some looks at what is busy
            assert not end.done()
        reply = await line.answer()
        assert is_hit(reply)
        assert reply.header("Connection") == "close"
        assert await line.rest() == b""
        await end
        monkeypatch.setattr(edge.app, "run", _nothing)


async def _nothing() -> None:
    """It has ended."""


async def test_the_end_of_a_drain_gives_it_to_aiohttp(server: StoreServer) -> None:
    """Whose own end waits for it a moment longer; it is not lost without a word."""
    async with served(server) as (edge, line, ours):
        async with pending(server, edge, line, ours):
            ours.close()
            assert ours._later is None
            shutdown = asyncio.create_task(ours.shutdown(TIMEOUT))
            await asyncio.sleep(0)
        assert is_hit(await line.answer())
        await shutdown


async def test_a_server_that_hangs_is_gone_on_without(
    server: StoreServer, queued: list[bool]
) -> None:
    """After its time the visit is this broker's own: the token that it holds, its share's limit."""
    async with served(server, timeout=0.2) as (edge, line, ours):
        queued.clear()
        async with pending(server, edge, line, ours):
            reply = await line.answer()
            assert is_hit(reply)
            assert reply.header("X-RateLimit-Remaining") == "19"  # a bucket of its own
            counts = await edge.scrape()
            assert counts['broker_store_errors_total{reason="timeout"}'] >= 1
        assert queued == []


async def test_a_server_that_hangs_is_told_of_where_it_must_be_there(server: StoreServer) -> None:
    """`on_error = "closed"`: 503, and counted as shed."""
    async with (
        served(server, timeout=0.2, on_error="closed") as (edge, line, ours),
        pending(server, edge, line, ours),
    ):
        reply = await line.answer()
        assert reply.status == 503
        assert reply.code == "SERVICE_UNAVAILABLE"


async def test_a_server_that_is_killed_is_gone_on_without(server: StoreServer) -> None:
    """At once: the connection has ended."""
    async with served(server) as (edge, line, ours):
        server.pause()
        line.send(edge.asking(VISITOR))
        await until(lambda: ours._later is not None)
        os.kill(server.pid, signal.SIGKILL)
        reply = await line.answer()
        assert is_hit(reply)
        assert reply.header("X-RateLimit-Remaining") == "19"
        counts = await edge.scrape()
        assert counts['broker_store_errors_total{reason="connection"}'] >= 1
        server.kill()


async def test_a_server_without_the_script_gets_it(server: StoreServer, queued: list[bool]) -> None:
    """A question that was not asked is asked the ordinary way; the next one is a question again."""
    async with served(server) as (edge, line, _):
        queued.clear()
        server.command("SCRIPT", "FLUSH")
        for left in ("17", "16"):
            line.send(edge.asking(VISITOR))
            reply = await line.answer()
            assert is_hit(reply)
            assert reply.header("X-RateLimit-Remaining") == left
        assert queued == [True]


async def test_what_is_asked_for_is_what_is_held(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: by key and version; after a change of either the server need not send the token."""
    sent: list[str] = []
    adopt = NearCache.adopt

    def noted(self: NearCache, request: TokenRequest, key: str, *told: Any) -> Any:
        sent.append(key)
        return adopt(self, request, key, *told)

    async with served(server) as (edge, line, _):
        monkeypatch.setattr(NearCache, "adopt", noted)

        async def request_token(**fields: object) -> Reply:
            line.send(edge.asking(VISITOR, **fields))
            return await line.answer()

        first, other = await request_token(), await request_token(model="m")
        second = await request_token(fresh=True)
        assert len({first.token, other.token, second.token}) == 3
        sent.clear()
        for _ in range(3):
            assert (await request_token()).token == second.token
            assert (await request_token(model="m")).token == other.token
        assert sent == []


async def test_a_stranger_is_minted_for_in_a_task(server: StoreServer, queued: list[bool]) -> None:
    """No token there: the visit is not made again, the mint is aiohttp's to wait for."""
    async with served(server) as (edge, line, _):
        queued.clear()
        line.send(edge.asking(visitor()))
        reply = await line.answer()
        assert reply.cache_status == "embed-token-broker; fwd=miss"
        assert reply.header("X-RateLimit-Remaining") == "19"
        assert queued == [True]


@pytest.mark.parametrize("part", ["route", "store"])
async def test_a_defect_of_what_hears_the_reply_is_told(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """500 in the envelope; the replies behind it are their callers'."""
    async with served(server) as (edge, line, ours):
        edge.defects_expected = True
        other = await edge.connect()

        def fail(*_args: object) -> None:
            raise ZeroDivisionError

        async with pending(server, edge, line, ours):
            other.send(edge.asking(VISITOR))
            await until(lambda: sum(c.is_busy for c in _connections(edge)) == 2)
            if part == "route":
                monkeypatch.setattr(edge.app.parts.routes.tokens, "_issued", fail)
                monkeypatch.setattr(edge.app.parts.routes.tokens, "_failed", fail)
            else:
                monkeypatch.setattr(Visits, "read", fail)
        for each in (line, other):
            reply = await each.answer()
            assert (reply.status, reply.code) == (500, "INTERNAL_ERROR")
        monkeypatch.undo()
        assert is_hit(await edge.request_token(VISITOR))
        await other.close()


async def test_a_loop_that_was_ended_meanwhile_gets_no_request(server: StoreServer) -> None:
    """Nothing is raised where the reply arrives, and nothing begun is left."""
    async with served(server) as (edge, line, ours):
        stranger = visitor()
        server.pause()
        line.send(edge.asking(stranger))
        await until(lambda: ours._later is not None)
        assert ours.loop_task is not None
        ours.loop_task.cancel()
        await asyncio.wait([ours.loop_task])
        server.resume()
        await until(lambda: ours._later is None)
        line.writer.transport.abort()
        assert is_hit(await edge.request_token(VISITOR))


def _rests(edge: Edge) -> bool:
    """Whether nothing is under way to the store."""
    return bool(_link(edge).rests)


def _link(edge: Edge) -> Any:
    assert edge.app.parts.shared_backend is not None
    nodes: Any = edge.app.parts.shared_backend.server.nodes
    return nodes._link


def _connections(edge: Edge) -> list[Any]:
    return list(edge.app.parts.server.connections)
