"""Subscriptions: every message once, whatever comes with it; one that is silent is made anew."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable

import pytest
import structlog
from bad_replies import BAD, Between
from servers import StoreServer

from broker.config.addresses import Access, StoreAddress
from broker.valkey.client import pubsub
from broker.valkey.client.scripts import command
from broker.valkey.client.topology import Topology, nodes_at

pytestmark = pytest.mark.parts

TIMEOUT = 120.0
"""Seconds for what should happen at once, on a machine that is busy."""


class Wire:
    """A relay to a server: it can stop to deliver what comes from there, and stay connected."""

    def __init__(self, to: str) -> None:
        self._to = to
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.subscriptions = 0
        self.is_deaf = False

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut all connections."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_unix_connection(self._to)
        listens = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, back, listens))
                await self._deliver(there, writer, listens)
                raise ConnectionResetError
        except* ConnectionError:
            pass
        finally:
            writer.close()
            back.transport.abort()  # a server that stands still would take what is left, one day

    async def _forward(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, listens: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 16):
            if b"SUBSCRIBE" in data:
                self.subscriptions += 1
                listens.set()
            back.write(data)
        raise ConnectionResetError

    async def _deliver(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, listens: asyncio.Event
    ) -> None:
        deaf = False
        while data := await there.read(1 << 16):
            deaf = deaf or (listens.is_set() and self.is_deaf)
            if not deaf:
                writer.write(data)


class Subscriber:
    """A subscriber on two channels, and what it heard."""

    def __init__(self, nodes: Topology) -> None:
        self.nodes = nodes
        self.channels = [b"etb:wake:" + secrets.token_hex(8).encode(), b"etb:{x}:news"]
        self.received: list[tuple[bytes, bytes]] = []

    def take(self, channel: bytes, message: bytes) -> None:
        """Keep it."""
        self.received.append((channel, message))

    async def receives(self, server: StoreServer) -> None:
        """Publish until something arrives."""
        word = secrets.token_hex(8).encode()
        async with asyncio.timeout(TIMEOUT):
            while (self.channels[1], word) not in self.received:
                server.command("PUBLISH", self.channels[1], word)
                await asyncio.sleep(0.02)


@pytest.fixture
async def wire(valkey: StoreServer) -> AsyncIterator[Wire]:
    """The way to the server."""
    wire = Wire(valkey.address.path)
    await wire.open()
    yield wire
    await wire.close()


@pytest.fixture
async def subscriber(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Subscriber]:
    """Somebody who listens by that way, and is impatient."""
    monkeypatch.setattr(pubsub, "SILENCE", 0.1)
    monkeypatch.setattr(pubsub, "ECHO_TIMEOUT", 1.0)
    monkeypatch.setattr(pubsub, "RETRY", 0.05)
    nodes = nodes_at(StoreAddress(hosts=(("127.0.0.1", wire.port),)), Access(), TIMEOUT)
    await nodes.open()
    subscriber = Subscriber(nodes)
    task = asyncio.create_task(pubsub.listen(nodes, subscriber.channels, subscriber.take))
    yield subscriber
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await nodes.close()


async def until(look: Callable[[], bool]) -> None:
    """Look every few milliseconds until it is so."""
    ends = time.monotonic() + TIMEOUT
    while not look():
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)


def published(server: StoreServer) -> int:
    """Count the messages that were published there."""
    told = server.command("INFO", "commandstats")
    count: int = told["cmdstat_publish"]["calls"]
    return count


async def test_N26_a_subscription_that_delivers_nothing_is_made_anew(
    subscriber: Subscriber, wire: Wire, valkey: StoreServer
) -> None:
    """Its connection lives and says nothing any more, while calls are answered as before."""
    await subscriber.receives(valkey)
    with structlog.testing.capture_logs() as told:
        for round_ in range(2, 4):
            wire.is_deaf = True
            valkey.command("PUBLISH", subscriber.channels[1], b"lost")
            await until(lambda: any(e["event"] == "broker.news_silent" for e in told))
            wire.is_deaf = False
            await subscriber.receives(valkey)
            assert wire.subscriptions >= round_
            told.clear()


async def test_N26_a_quiet_subscription_that_delivers_stays(
    subscriber: Subscriber, wire: Wire, valkey: StoreServer
) -> None:
    """Its own words come back to it, and are no news to anybody."""
    await subscriber.receives(valkey)
    count = len(subscriber.received)
    before = published(valkey)
    await until(lambda: published(valkey) >= before + 5)
    assert wire.subscriptions == 1
    assert len(subscriber.received) == count


async def test_N26_a_store_that_is_away_is_no_word_about_the_subscription(
    subscriber: Subscriber, wire: Wire, valkey: StoreServer
) -> None:
    """Calls fail as well: the connection is left alone, and delivers again by itself."""
    subscriber.nodes._link._timeout = 0.1  # type: ignore[attr-defined]
    await subscriber.receives(valkey)
    valkey.pause()
    try:
        await asyncio.sleep(1.0)
    finally:
        valkey.resume()
    await subscriber.receives(valkey)
    assert wire.subscriptions == 1


@pytest.mark.parametrize("name", BAD)
async def test_S1_whatever_a_subscription_is_told_it_hears_again(
    valkey: StoreServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Instead of its confirmation; and nothing but that is heard."""
    monkeypatch.setattr(pubsub, "SILENCE", 0.2)
    monkeypatch.setattr(pubsub, "ECHO_TIMEOUT", 0.5)
    monkeypatch.setattr(pubsub, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(pubsub, "RETRY", 0.05)
    between = Between(valkey.address.path)
    between.ill = BAD[name]
    await between.open()
    nodes = nodes_at(StoreAddress(hosts=(("127.0.0.1", between.port),)), Access(), 1.0)
    await nodes.open()
    subscriber = Subscriber(nodes)
    task = asyncio.create_task(pubsub.listen(nodes, subscriber.channels, subscriber.take))
    try:
        await until(lambda: between.said >= 2 or task.done())
        between.ill = None
        await subscriber.receives(valkey)
        assert {channel for channel, _ in subscriber.received} == {subscriber.channels[1]}
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await nodes.close()
        await between.close()


async def test_a_flood_is_heard_in_full_and_in_order(
    subscriber: Subscriber, valkey: StoreServer
) -> None:
    """Ten thousand in one piece; others get their turn meanwhile."""
    await subscriber.receives(valkey)
    subscriber.received.clear()
    words = [b"%d" % number for number in range(10_000)]
    longest, stop = 0, asyncio.Event()

    async def tick() -> None:
        nonlocal longest
        while not stop.is_set():
            before = len(subscriber.received)
            await asyncio.sleep(0)
            longest = max(longest, len(subscriber.received) - before)

    ticking = asyncio.create_task(tick())
    flood = b"".join(command(b"PUBLISH", subscriber.channels[1], word) for word in words)
    _, writer = await asyncio.open_unix_connection(valkey.address.path)
    writer.write(flood)
    await until(lambda: len(subscriber.received) >= len(words))
    stop.set()
    await ticking
    assert [message for _, message in subscriber.received] == words
    assert longest <= 2 * pubsub.AT_A_TIME
    writer.close()


async def test_N26_each_word_that_is_expected_arrives_for_itself() -> None:
    """One that came in time says nothing about the next one; an old word is none."""
    heard = list[tuple[bytes, bytes]]()
    subscription = pubsub.Subscription([b"c"], b"", lambda *told: heard.append(told))

    def said(word: bytes) -> None:
        subscription.data_received(
            b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$%d\r\n%b\r\n" % (len(word), word)
        )

    first, arrived = subscription.expect()
    said(first)
    assert arrived.done()
    second, arrived = subscription.expect()
    assert second != first
    assert not arrived.done()
    said(first)
    assert not arrived.done()
    said(second)
    said(second)
    assert arrived.done()
    said(b"x")
    assert heard == [(b"c", b"x")]
    assert subscription.messages == 5
    subscription.close()
