"""How a cluster is found and followed, through real sockets to nodes that say what a test wants."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.crc import key_slot
from test_connection import Node

from broker.config.addresses import Access, StoreAddress
from broker.model import Secret
from broker.valkey.client import topology as module
from broker.valkey.client.errors import Reason, StoreFailed
from broker.valkey.client.scripts import command
from broker.valkey.client.topology import FIRST_PAUSE, LONGEST_PAUSE, Cluster

TIMEOUT = 0.5
GET = command(b"GET", b"etb:{x}:y")
KEY = b"etb:{x}:y"


def slots(*nodes: Node, host: bytes | None = b"127.0.0.1") -> bytes:
    """Say CLUSTER SLOTS: the slots divided between these."""
    told, share = b"*%d\r\n" % len(nodes), 16384 // len(nodes)
    for place, node in enumerate(nodes):
        last = 16383 if place == len(nodes) - 1 else (place + 1) * share - 1
        name = b"$-1\r\n" if host is None else b"$%d\r\n%b\r\n" % (len(host), host)
        told += b"*3\r\n:%d\r\n:%d\r\n*2\r\n%b:%d\r\n" % (place * share, last, name, node.port)
    return told


class Town:
    """Nodes, what they tell of each other, and a cluster that was told of the first."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.told = slots(nodes[0])
        self.said = b"$1\r\nv\r\n"
        self.readings = 0
        for node in nodes:
            node.answer = self._answer
        address = StoreAddress(hosts=(("127.0.0.1", nodes[0].port),), cluster=True)
        self.cluster = Cluster(address, Access(), TIMEOUT)

    def _answer(self, piece: bytes) -> bytes:
        replies = b""
        for call in piece.split(b"*")[1:]:
            if b"SLOTS" in call:
                self.readings += 1
                replies += self.told
            elif b"AUTH" in call or b"ASKING" in call:
                replies += b"+OK\r\n"
            else:
                replies += self.said
        return replies

    async def get(self) -> object:
        """Ask for a key; returns the reply or the failure's reason."""
        try:
            return await self.cluster.command(KEY, GET)
        except StoreFailed as failed:
            return failed.reason


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    """Three nodes, of which the first has every slot."""
    async with AsyncExitStack() as stack:
        nodes = [Node() for _ in range(3)]
        for node in nodes:
            await node.open()
            stack.push_async_callback(node.close)
        town = Town(nodes)
        await town.cluster.open()
        stack.push_async_callback(town.cluster.close)
        yield town


@pytest.mark.parametrize("host", [None, b"", b"?"])
async def test_a_node_without_a_name_is_behind_the_address_that_was_asked(
    town: Town, host: bytes | None
) -> None:
    """As servers say it that prefer names and were given none."""
    town.told = slots(town.nodes[1], host=host)
    assert await town.get() == b"v"
    assert town.nodes[1].connections == 1


@pytest.mark.parametrize("host", ["", "?", "127.0.0.1"])
async def test_so_is_one_to_which_a_call_is_sent_on(town: Town, host: str) -> None:
    """MOVED: the slot is elsewhere, and the next call goes there at once."""
    assert await town.get() == b"v"
    moved = f"-MOVED 1 {host}:{town.nodes[1].port}\r\n".encode()
    town.nodes[0].answer = lambda piece: town.told if b"SLOTS" in piece else moved
    for _ in range(2):
        assert await town.get() == b"v"
    assert town.nodes[1].connections == 1


async def test_a_slot_that_is_on_its_way_is_asked_for_once_more(town: Town) -> None:
    """After a moment; nothing is read anew for it, and no connection is closed."""
    assert await town.get() == b"v"
    replies = [b"-TRYAGAIN x\r\n", b"$1\r\nw\r\n"]
    town.nodes[0].answer = lambda _piece: replies.pop(0)
    assert await town.get() == b"w"
    said = [b"-TRYAGAIN x\r\n", b"-TRYAGAIN y\r\n", b"$1\r\nw\r\n"]
    town.nodes[0].answer = lambda _piece: said.pop(0)
    assert await town.get() is Reason.CLUSTER_DOWN
    assert (town.nodes[0].connections, town.readings) == (1, 1)


async def test_the_topology_is_read_less_often_while_it_tells_nothing_new(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second, doubled up to five, less up to half by chance; what is new begins anew."""
    monkeypatch.setattr(module.random, "random", lambda: 0.0)
    cluster, loop = town.cluster, asyncio.get_running_loop()
    assert await town.get() == b"v"

    async def pause_after_a_reading() -> float:
        cluster._not_before = loop.time()
        cluster._refresh()
        assert cluster._refreshing is not None
        await cluster._refreshing
        return round(cluster._not_before - loop.time(), 1)

    assert [await pause_after_a_reading() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    town.told = slots(town.nodes[0], town.nodes[1])
    assert await pause_after_a_reading() == FIRST_PAUSE
    monkeypatch.setattr(module.random, "random", lambda: 0.999)
    assert await pause_after_a_reading() == FIRST_PAUSE  # half of the doubled one
    before = town.readings
    for _ in range(100):  # an outage: every call would have it read anew
        cluster._refresh()
    assert town.readings == before
    cluster._not_before = loop.time() - LONGEST_PAUSE - 1  # nobody needed it for a while
    cluster._pause = LONGEST_PAUSE
    cluster._refresh()
    await cluster._refreshing
    assert cluster._pause == 2 * FIRST_PAUSE


async def test_where_nothing_is_known_it_is_read_at_once(town: Town) -> None:
    """A cluster that comes back is there for the next call, which is a probe of the breaker's."""
    town.told = b"-LOADING\r\n"
    for _ in range(3):
        assert await town.get() is Reason.CLUSTER_DOWN
    assert town.readings >= 3
    town.told = slots(town.nodes[0])
    assert await town.get() == b"v"


async def test_links_to_nodes_that_have_gone_are_closed(town: Town) -> None:
    """However many a cluster has had, or has sent a call on to: those of now are left."""
    town.told = slots(*town.nodes)
    assert await town.get() == b"v"
    cluster = town.cluster
    for node in town.nodes:
        await cluster._link(("127.0.0.1", node.port)).send(GET)
    assert len(cluster._links) == 3
    town.told = slots(town.nodes[0])
    cluster._not_before = 0.0
    cluster._refresh()
    assert cluster._refreshing is not None
    await cluster._refreshing
    assert list(cluster._links) == [("127.0.0.1", town.nodes[0].port)]
    assert await town.get() == b"v"


async def test_a_node_that_has_gone_is_heard_out(town: Town) -> None:
    """A call to it is out at that moment: it gets its answer, then the link is closed."""
    cluster, (first, _, gone) = town.cluster, town.nodes
    cluster._timeout = 30.0
    town.told = slots(*town.nodes)
    assert await town.get() == b"v"
    link = cluster._link(("127.0.0.1", gone.port))
    arrived = asyncio.Event()

    def say_nothing(_piece: bytes) -> bytes:
        arrived.set()
        return b""

    gone.answer = say_nothing
    call = link.send(GET)
    await asyncio.wait_for(arrived.wait(), 10)
    town.told = slots(first)
    for _ in range(2):
        cluster._not_before = 0.0
        cluster._refresh()
        assert cluster._refreshing is not None
        await cluster._refreshing
        if not call.done():
            gone._writers[-1].write(b"$1\r\nv\r\n")
            assert await call == b"v"
    assert await call == b"v"
    assert list(cluster._links) == [("127.0.0.1", first.port)]


async def test_S1_a_cluster_that_leads_on_and_on_is_bounded(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call is sent to another node, which nobody has: calls fail, few connections are kept."""
    monkeypatch.setattr(module, "MOST_NODES", 20)
    assert await town.get() == b"v"
    for port in range(1, 40):
        town.said = b"-MOVED 1 127.0.0.1:%d\r\n" % port
        for node in town.nodes:
            town.cluster._slots[key_slot(KEY)] = ("127.0.0.1", node.port)
            assert isinstance(await town.get(), Reason)
    assert len(town.cluster._links) <= 20
    town.said = b"$1\r\nv\r\n"
    town.cluster._slots[key_slot(KEY)] = ("127.0.0.1", town.nodes[0].port)
    assert await town.get() == b"v"


async def test_O7_every_node_is_told_the_new_password_from_its_next_connection_on(
    town: Town,
) -> None:
    """Also those that are connected already when the password changes."""
    town.told = slots(*town.nodes)
    assert await town.get() == b"v"
    links = [town.cluster._link(("127.0.0.1", node.port)) for node in town.nodes]
    for link in links:
        assert await link.send(GET) == b"v"
    password = secrets.token_urlsafe(16)
    town.cluster.use_access(Access(password=Secret(password)))
    for node, link in zip(town.nodes, links, strict=True):
        node.hang_up()
        while not link.rests or link._talk is not None:  # noqa: ASYNC110 - the end has to arrive
            await asyncio.sleep(0.001)
        node.pieces.clear()
        assert await link.send(GET) == b"v"
        assert node.pieces[0] == command(b"AUTH", password.encode())


async def test_O7_a_node_that_is_met_later_is_told_the_new_password(town: Town) -> None:
    """Also one to which no connection was open when the password changed."""
    assert await town.get() == b"v"
    password = secrets.token_urlsafe(16)
    town.cluster.use_access(Access(password=Secret(password)))
    moved = f"-MOVED 1 127.0.0.1:{town.nodes[1].port}\r\n".encode()
    town.nodes[0].answer = lambda piece: town.told if b"SLOTS" in piece else moved
    assert await town.get() == b"v"
    assert town.nodes[1].pieces[0] == command(b"AUTH", password.encode())


@pytest.mark.parametrize("said", ["-MOVED 1 127.0.0.1:{}\r\n", "-READONLY x\r\n", None])
async def test_S1_a_node_that_is_not_the_right_one_makes_it_read_the_topology(
    town: Town, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    """Sent elsewhere, a replica by now, or gone: other slots may have moved, too."""
    assert await town.get() == b"v"
    read = asyncio.Event()
    monkeypatch.setattr(town.cluster, "_refresh", read.set)
    told = None if said is None else said.format(town.nodes[1].port).encode()
    town.nodes[0].answer = lambda _piece: told
    await town.get()
    assert read.is_set()


@pytest.mark.parametrize(
    ("said", "reason"), [("WRONGTYPE", Reason.SCRIPT), ("TRYAGAIN", Reason.CLUSTER_DOWN)]
)
async def test_S1_a_failure_of_one_key_says_nothing_about_its_node(
    town: Town, monkeypatch: pytest.MonkeyPatch, said: str, reason: Reason
) -> None:
    """A foreign value, or a slot on its way: nothing is read anew for it."""
    assert await town.get() == b"v"
    read = asyncio.Event()
    monkeypatch.setattr(town.cluster, "_refresh", read.set)
    town.nodes[0].answer = lambda _piece: f"-{said} x\r\n".encode()
    assert await town.get() is reason
    assert not read.is_set()
