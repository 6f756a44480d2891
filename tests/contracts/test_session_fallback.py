"""Sessions on real servers: Valkey, Redis and a cluster keep the contract, and keep no secret."""

import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest

pytest.register_assert_rewrite("session_contract")

from asyncio import sleep  # noqa: E402 - after the rewrite, as what follows
from contextlib import AsyncExitStack, asynccontextmanager  # noqa: E402

from servers import AnyServer, StoreServer, store_server, valkey_binary  # noqa: E402
from session_contract import (  # noqa: E402
    AGENT,
    EVERYTHING,
    MOST_DISOWNED,
    OpenedSessionStore,
    OpenSessionStore,
    SessionStoreContract,
    everything,
    recorded,
    session_of,
)

from broker.clock import SystemClock  # noqa: E402
from broker.errors import ServiceUnavailable  # noqa: E402
from broker.model import Secret  # noqa: E402
from broker.sealing import Box, derive  # noqa: E402
from broker.sessions.base import MARK_LIFE, Place, SessionsFull, place_of  # noqa: E402
from broker.sessions.memory import MemorySessions  # noqa: E402
from broker.telemetry.cells import MetricLayout  # noqa: E402
from broker.telemetry.metrics import StoreMetrics  # noqa: E402
from broker.testing import FakeClock  # noqa: E402
from broker.units import SECOND  # noqa: E402
from broker.valkey.client.errors import Reason, StoreFailed  # noqa: E402
from broker.valkey.client.guarded import StoreClient  # noqa: E402
from broker.valkey.client.resp import Reply  # noqa: E402
from broker.valkey.client.topology import nodes_at  # noqa: E402
from broker.valkey.key_names import Names  # noqa: E402
from broker.valkey.session_fallback import BATCH, SharedSessions  # noqa: E402
from broker.valkey.sessions import ValkeySessions  # noqa: E402

pytestmark = pytest.mark.parts

KEY = Secret(secrets.token_urlsafe(48))
TIMEOUT = 5.0
"""Seconds for one call: these machines are busy, and no test here is about time-outs."""


class Opened(OpenedSessionStore):
    """A session store on a server, by the system's clock."""

    def __init__(
        self, session_store: SharedSessions, server: StoreClient, on: AnyServer, store: "Ends"
    ) -> None:
        self.session_store = session_store
        self.server = server
        self.on = on
        self.store = store

    def wall(self) -> int:
        return SystemClock().wall()

    async def pass_time(self, seconds: float) -> None:
        await sleep(seconds)

    async def size(self) -> int:
        return len(self.on.all_keys())


class Ends:
    """Takes note of visitors that were ended."""

    def __init__(self) -> None:
        self.visitors: list[tuple[str, str]] = []

    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        """As a store does."""
        assert keys
        self.visitors.append((client, fingerprint))


@asynccontextmanager
async def opened_on(
    on: AnyServer, *, most: int = 1000, closed: bool = False, key: Secret = KEY
) -> AsyncIterator[Opened]:
    """Open the sessions of a replica."""
    clock = SystemClock()
    server = StoreClient(
        nodes_at(on.address, on.access, TIMEOUT), clock, StoreMetrics(MetricLayout(), shown=True)
    )
    await server.nodes.open()
    names = Names(derive(key, "key names"), "test")
    box = Box(key, "sessions in a shared store")
    remote = ValkeySessions(server, names, box, most, clock, MOST_DISOWNED)
    try:
        store = Ends()
        session_store = SharedSessions(remote, MemorySessions(most, clock), store, closed=closed)
        yield Opened(session_store, server, on, store)
    finally:
        await server.close()


class OnAServer(SessionStoreContract):
    """The contract, on the server that a subclass names."""

    engine: str

    @pytest.fixture
    async def open_session_store(
        self, request: pytest.FixtureRequest
    ) -> AsyncIterator[OpenSessionStore]:
        on: AnyServer = request.getfixturevalue(self.engine)
        on.flush()
        async with AsyncExitStack() as stack:

            async def opened() -> OpenedSessionStore:
                return await stack.enter_async_context(opened_on(on))

            yield opened


class TestOnValkey(OnAServer):
    engine = "valkey"


class TestOnRedis(OnAServer):
    engine = "redis7"


class TestOnACluster(OnAServer):
    engine = "valkey_cluster"


async def test_G9_what_one_replica_ends_is_over_for_all(valkey: StoreServer) -> None:
    """Recorded at one, found and ended at another, gone at a third, at once."""
    valkey.flush()
    async with opened_on(valkey) as one, opened_on(valkey) as two, opened_on(valkey) as three:
        session = await recorded(one, token="t")
        assert await two.session_store.find(session.session_id) == session
        assert await three.session_store.find_token(session.digest) == session
        await two.end(session)
        for opened in (one, two, three):
            assert await opened.session_store.ended(session.session_id)
            assert await opened.session_store.find(session.session_id) is None
            assert await opened.session_store.find_token(session.digest) is None
            assert await opened.session_store.page(EVERYTHING, Place(), 10) == []


async def test_G9_an_end_that_the_server_cuts_short_is_completed_by_the_token(
    valkey: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record of two is gone: no list shows the session, and its client can ask again."""
    valkey.flush()
    async with opened_on(valkey) as one:
        session = await recorded(one, token="t")
        send, sent = one.server.command, 0

        async def once(*call: Any) -> Reply:
            nonlocal sent
            sent += 1
            if sent > 1:
                raise StoreFailed(Reason.CONNECTION)
            return await send(*call)

        with monkeypatch.context() as patch:
            patch.setattr(one.server, "command", once)
            await fails(one.session_store.forget(session))
        assert await one.session_store.page(EVERYTHING, Place(), 10) == []
        assert await one.session_store.find_token(session.digest) == session
        await one.end(session)
        assert await one.session_store.find_token(session.digest) is None


async def test_G9_an_end_counts_though_this_replica_can_note_no_more(valkey: StoreServer) -> None:
    """The server has it, and so it holds for all: what is missing is this replica's own mark."""
    valkey.flush()
    async with opened_on(valkey) as one:
        one.session_store._alone._most_ended = 0
        session = await recorded(one, token="t")
        await one.end(session, by_client=True)
        assert await one.session_store.ended(session.session_id)
        assert await one.session_store.find(session.session_id) is None


async def test_G7_the_server_learns_nothing_of_a_visitor(valkey: StoreServer) -> None:
    """No fingerprint, token or client in any name or value; another key opens no record."""
    valkey.flush()
    async with opened_on(valkey) as opened:
        session = await recorded(opened, token="a-token", fingerprint="feedfacecafe", client="shop")
        await opened.end(await recorded(opened, fingerprint="feedfacecafe"))
        dump = b"\n".join([*valkey.all_keys(), *contents(valkey)])
        for word in (b"feedface", b"a-token", session.digest, b"shop"):
            assert word not in dump
            assert word.hex().encode() not in dump
        foreign = Secret(secrets.token_urlsafe(48))
        async with opened_on(valkey, key=foreign) as other:
            assert await other.session_store.find(session.session_id) is None
        moved = opened.session_store._remote._names
        valkey.command("COPY", moved.session(session.session_id), moved.session("other"))
        assert await opened.session_store.find("other") is None, (
            "a record opens under its own name only"
        )


def contents(server: StoreServer) -> list[bytes]:
    """Return the value of every key, whatever its type."""
    values: list[Any] = []
    for key in server.all_keys():
        if server.command("TYPE", key) in (b"zset", "zset"):
            values += server.command("ZRANGE", key, 0, -1)
        else:
            values.append(server.command("GET", key))
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]


async def test_L3_every_key_ends_by_itself_in_time(valkey: StoreServer) -> None:
    """A record with its session, a list with its last one, a mark when no token can be shown."""
    valkey.flush()
    async with opened_on(valkey) as opened:
        await recorded(opened, life=100, token="t", agent="A1", fingerprint="beef")
        await recorded(opened, life=50, agent="A1", fingerprint="beef")
        await opened.end(session_of(opened))
        names = opened.session_store._remote._names
        lives = {key: int(valkey.command("PTTL", key)) for key in valkey.all_keys()}
        assert all(life > 0 for life in lives.values())
        for listed in (names.of_agent("A1"), names.of_visitor("beef")):
            assert 98_000 < lives[listed] <= 100_000
        assert sum(98_000 < life <= 100_000 for life in lives.values()) == 4
        marks = [life for key, life in lives.items() if key.endswith(b":ended")]
        assert [MARK_LIFE // 1000 - 5000 < life <= MARK_LIFE // 1000 for life in marks] == [True]


async def test_G6_a_list_is_bounded_and_loses_what_expires_first(valkey: StoreServer) -> None:
    """What expired long ago leaves, too; a record that is in no list is still a record."""
    valkey.flush()
    async with opened_on(valkey, most=5) as opened:
        made = [await recorded(opened, life=100 + n, fingerprint="beef") for n in range(8)]
        assert await everything(opened.session_store, EVERYTHING, 3) == made[3:]
        assert await opened.session_store.find(made[0].session_id) == made[0]
        listed = opened.session_store._remote._names.of_agent(AGENT)
        long_ago = int(time.time()) - 100
        valkey.command("ZADD", listed, long_ago, "long-gone")
        await recorded(opened, life=200)
        assert valkey.command("ZSCORE", listed, "long-gone") is None


async def test_an_expired_session_is_not_found_though_the_server_has_it(
    valkey: StoreServer,
) -> None:
    """By this replica's clock as well: the server's may be behind."""
    valkey.flush()
    async with opened_on(valkey) as opened:
        session = await recorded(opened, token="t", life=60)
        clock = opened.session_store._remote._clock = FakeClock(wall=session.expires * SECOND - 1)
        assert await opened.session_store._remote.find(session.session_id) == session
        clock.advance(0.000001)
        assert await opened.session_store._remote.find(session.session_id) is None
        assert await opened.session_store._remote.find_token(session.digest) is None
        assert await opened.session_store._remote.page(EVERYTHING, Place(), 10) == []


class TestWhileTheServerIsAway:
    """Row S1: the policy holds, and nothing is lost or brought back."""

    async def test_S1_local_goes_on_with_what_is_known_here(self) -> None:
        """Own tokens are known; whoever asks for one after the return finds it everywhere."""
        with store_server(valkey_binary()) as server:
            async with opened_on(server) as opened, opened_on(server) as other:
                before = await recorded(opened, token="before")
                server.kill()
                await fails(opened.session_store.page(EVERYTHING, Place(), 10))
                during = await recorded(opened, token="during")
                for session in (before, during):
                    await fails(opened.session_store.find(session.session_id))
                    assert await opened.session_store.find_token(session.digest) == session
                    assert not await opened.session_store.ended(session.session_id)
                await fails(other.session_store.find_token(before.digest))
                await fails(opened.end(before))
                server.start()
                await back(opened, other)
                assert await opened.session_store.find(during.session_id) == during
                assert await other.session_store.find_token(during.digest) == during
                await other.end(during)
                assert await opened.session_store.find(during.session_id) is None, (
                    "not brought back"
                )
                assert await opened.session_store.find_token(during.digest) is None

    async def test_S1_what_was_recorded_meanwhile_is_written_afterwards(self) -> None:
        """Nobody has to ask for it here: other replicas find and list it, some batches of it.

        What failed half-way comes with the next attempt, and what was ended stays so.
        """
        with store_server(valkey_binary()) as server:
            async with opened_on(server) as opened, opened_on(server) as other:
                server.kill()
                made = [await recorded(opened, token=str(n)) for n in range(3 * BATCH)]
                opened.session_store.purge_expired()  # none of them has
                assert f"unwritten={len(made)}" in repr(opened.session_store)
                await opened.session_store.catch_up()
                server.start()
                await back(opened, other)
                await other.end(made[0])
                await opened.session_store.catch_up()
                live = sorted(made[1:], key=place_of)
                assert await everything(other.session_store, EVERYTHING, 10) == live
                assert await other.session_store.find_token(made[-1].digest) == made[-1]
                for one in (opened, other):
                    assert await one.session_store.find(made[0].session_id) is None
                    assert await one.session_store.find_token(made[0].digest) is None
                assert "unwritten=0" in repr(opened.session_store)

    async def test_N21_local_does_not_say_that_there_is_none(self) -> None:
        """A token, a session, a list: what is not known here may be known to the server."""
        with store_server(valkey_binary()) as server:
            async with opened_on(server) as opened, opened_on(server) as other:
                session = await recorded(other, token="t")
                server.kill()
                await fails(opened.session_store.find(session.session_id))
                await fails(opened.session_store.find("never"))
                await fails(opened.session_store.find_token(session.digest))
                await fails(opened.session_store.disown(session.digest, session.client))
                await fails(opened.session_store.page(EVERYTHING, Place(), 10))
                server.start()
                await back(opened)
                assert await opened.session_store.find("never") is None
                assert await opened.session_store.find_token(session.digest) is None, (
                    "it kept nothing"
                )

    async def test_N21_a_token_that_was_ended_before_its_record_came_is_ended(self) -> None:
        """Made while one replica was cut off; ended at another, which cannot know it yet.

        A stranger's wish ends nothing.
        """
        with store_server(valkey_binary()) as server:
            async with opened_on(server) as opened, opened_on(server) as other:
                server.kill()
                mine, theirs = [await recorded(opened, token=t, client="web") for t in "ab"]
                server.start()
                await back(other)
                assert await other.session_store.disown(mine.digest, "web") is None
                assert await other.session_store.disown(theirs.digest, "stranger") is None
                await back(opened)
                await opened.session_store.catch_up()
                for one in (opened, other):
                    assert await one.session_store.ended(mine.session_id)
                    assert await one.session_store.find_token(mine.digest) is None
                    assert await one.session_store.find(theirs.session_id) == theirs
                    assert not await one.session_store.ended(theirs.session_id)
                assert opened.store.visitors == [("web", mine.fingerprint)]

    async def test_N21_a_note_goes_with_the_last_token_that_it_may_be_of(self) -> None:
        """One too many is refused until earlier ones have ended; a bound is no list for ever."""
        with store_server(valkey_binary()) as server:
            async with opened_on(server) as opened:
                digests = [secrets.token_bytes(32) for _ in range(MOST_DISOWNED + 1)]
                for digest in digests[:-1]:
                    assert await opened.session_store.disown(digest, "web") is None
                with pytest.raises(SessionsFull):
                    await opened.session_store.disown(digests[-1], "web")
                for key in server.command("KEYS", "*disowned*"):
                    left = server.command("PTTL", key)
                    assert 0 < MARK_LIFE // 1000 - left < 60_000
                (listed,) = server.command("KEYS", "*:all")
                for mark in server.command("ZRANGE", listed, 0, 1):
                    server.command("ZADD", listed, 1, mark)  # as if they were of 1970
                assert await opened.session_store.disown(digests[-1], "web") is None
                assert server.command("ZCARD", listed) == MOST_DISOWNED - 1

    async def test_N21_a_record_that_comes_while_it_is_missed_is_found(self) -> None:
        """The note is written before the second look: one of the two sees the other."""
        with store_server(valkey_binary()) as server:
            async with opened_on(server) as opened, opened_on(server) as other:
                session = await recorded(opened, token="t")
                assert await other.session_store.disown(session.digest, session.client) == session

    async def test_S1_closed_refuses(self) -> None:
        """503 and when to come back, for every question."""
        with store_server(valkey_binary()) as server:
            async with opened_on(server, closed=True) as opened:
                session = await recorded(opened, token="t")
                server.kill()
                await fails(opened.session_store.find(session.session_id))
                await fails(opened.session_store.find_token(session.digest))
                await fails(opened.session_store.ended(session.session_id))
                await fails(opened.session_store.record(session))
                await fails(opened.end(session))


async def fails(asked: Awaitable[object]) -> None:
    """It is refused with 503 and a Retry-After of a second."""
    with pytest.raises(ServiceUnavailable, match="the shared store is away") as refusal:
        await asked
    assert refusal.value.retry_after == 1_000_000


async def back(*opened: Opened) -> None:
    """Wait until every replica has found the server again."""
    ends = time.monotonic() + 30
    for one in opened:
        while True:
            await one.session_store.ended("x")
            if not one.server.is_away:
                break
            assert time.monotonic() < ends
            await sleep(0.05)
