"""Which server has a key: the one there is, or a node of a cluster.

Both answer `call` for a script and `command` for anything else, routed by the first key.  A cluster
is followed where it says MOVED or ASK, and its topology read anew, in the background, when a node
cannot be reached or says that it has changed.  The library's client of clusters is not used for
that: it wants to be permitted COMMAND, and waits seconds for a node that hangs.
"""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Awaitable, Sequence
from typing import Protocol

from redis.crc import key_slot
from typing_extensions import override

from broker.config.addresses import Access, StoreAddress
from broker.valkey.client import shapes
from broker.valkey.client.connection import PipelinedConnection
from broker.valkey.client.errors import (
    SLOTS,
    TRY_AGAIN,
    UNKNOWN,
    NoScript,
    Reason,
    Redirect,
    StoreFailed,
    is_node,
)
from broker.valkey.client.packing import Packed
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, ScriptKeys, command
from broker.valkey.client.shapes import ACCEPTED, ANYTHING, Shape
from broker.valkey.client.target import Target

REDIRECTS = 3
"""How often one call follows the cluster: a slot that moves sends it on twice."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0
"""Seconds between two readings of the topology: a failover takes a few.  Doubled by each reading
that tells nothing new, with up to half taken off by chance: a fleet must not ask in step."""

MOST_NODES = 2000
"""Nodes that are talked to: clusters have half as many at most, and the names of nodes are a
server's word."""

SLOT_PAUSE = 0.005
"""Seconds after which a call is tried again, once, whose slot is being moved at that moment."""

_ASKING = command(b"ASKING")
_CLUSTER_SLOTS = command(b"CLUSTER", b"SLOTS")

Where = tuple[str, int]
"""Host and port of a node."""


class Topology(Protocol):
    """Servers that hold the store."""

    async def open(self) -> None:
        """Begin; does not need a server to be there."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...

    async def command(self, key: bytes, packed: bytes, shape: Shape = ANYTHING) -> Reply:
        """Send a packed command to where `key` is; a reply of this shape.

        Raises StoreFailed, and NoScript for a script.
        """
        ...

    def send(self, key: bytes, packed: bytes, shape: Shape) -> Awaitable[Reply]:
        """Send as `command`, for those who send much; may raise Redirect for CLUSTER_DOWN."""
        return self.command(key, packed, shape)

    def link(self, _key: bytes) -> PipelinedConnection | None:
        """Return the connection to where `key` is, if no question has to be asked for that."""
        return None

    def anywhere(self) -> Target:
        """Return how any node is reached: subscriptions have connections of their own."""
        ...

    def use_access(self, access: Access) -> None:
        """Be let in otherwise from the next connection on: passwords and certificates change."""
        ...


async def call_in_full(
    nodes: Topology, script: Script, keys: ScriptKeys, arguments: Sequence[bytes | Packed]
) -> Reply:
    """Run a script that the server does not have, where its keys are; raises StoreFailed."""
    try:
        return await nodes.command(keys[0], script.in_full(keys, arguments), script.shape)
    except NoScript:
        raise StoreFailed(Reason.SCRIPT) from None


class SingleServer(Topology):
    """One server, by TCP, TLS or a Unix socket."""

    def __init__(self, address: StoreAddress, access: Access, timeout: float) -> None:
        self._address = address
        self._access = access
        self._timeout = timeout
        self._link: PipelinedConnection | None = None

    @override
    async def open(self) -> None:
        self._link = PipelinedConnection(target(self._address, self._access), self._timeout)

    @override
    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()

    @override
    def send(self, key: bytes, packed: bytes, shape: Shape) -> Awaitable[Reply]:
        assert self._link is not None  # open() comes first
        return self._link.send(packed, shape)

    @override
    def link(self, _key: bytes) -> PipelinedConnection | None:
        return self._link

    @override
    async def command(self, key: bytes, packed: bytes, shape: Shape = ANYTHING) -> Reply:
        try:
            return await self.send(key, packed, shape)
        except Redirect:  # a node of a cluster that was configured as if it were alone
            raise StoreFailed(Reason.CLUSTER_DOWN) from None

    @override
    def anywhere(self) -> Target:
        return target(self._address, self._access)

    @override
    def use_access(self, access: Access) -> None:
        self._access = access
        if self._link is not None:
            self._link.target = target(self._address, access)

    @override
    def __repr__(self) -> str:
        return f"SingleServer({self._address.shown}, {self._link!r})"


class Cluster(Topology):
    """A cluster, found by any of its nodes."""

    def __init__(self, address: StoreAddress, access: Access, timeout: float) -> None:
        self._address = address
        self._access = access
        self._timeout = timeout
        self._links: dict[Where, PipelinedConnection] = {}
        self._slots: dict[int, Where] = {}
        self._owners: tuple[Where, ...] = ()
        self._refreshing: asyncio.Task[None] | None = None
        self._was_read = asyncio.Event()
        self._pause = FIRST_PAUSE
        self._not_before = 0.0

    @override
    async def open(self) -> None:
        self._refresh()

    @override
    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        for link in self._links.values():
            await link.close()

    @override
    async def command(self, key: bytes, packed: bytes, shape: Shape = ANYTHING) -> Reply:
        slot = key_slot(key)
        where = self._slots.get(slot)
        if where is None:
            where = await self._first_topology(slot)
        has_paused = False
        for _ in range(REDIRECTS):
            try:
                return await self._link(where).send(packed, shape)
            except Redirect as moved:
                where = (moved.host or where[0], moved.port)
                if moved.asking:
                    return await self._send_redirected(where, packed, shape)
                self._slots[slot] = where
                self._refresh()
            except StoreFailed as failed:
                if failed.detail == TRY_AGAIN and not has_paused:
                    has_paused = True
                    await asyncio.sleep(SLOT_PAUSE)
                    continue
                if failed.reason in _NODE_IS_GONE and not failed.of_key:
                    self._refresh()
                raise
        raise StoreFailed(Reason.CLUSTER_DOWN)

    async def _send_redirected(self, where: Where, packed: bytes, shape: Shape) -> Reply:
        """Ask the node that is about to take the slot over: for this call only.

        Both go in one piece, so they share a connection.
        """
        link = self._link(where)
        asked = link.send(_ASKING, ACCEPTED)
        answer = link.send(packed, shape)
        await asyncio.wait([asked, answer])
        asked.exception()  # its failure is the answer's, too
        try:
            return answer.result()
        except Redirect:
            raise StoreFailed(Reason.CLUSTER_DOWN) from None

    async def _first_topology(self, slot: int) -> Where:
        """Wait for the topology, but not for longer than for a call."""
        self._refresh()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await self._was_read.wait()
        if slot not in self._slots:
            raise StoreFailed(Reason.CLUSTER_DOWN)
        return self._slots[slot]

    def _link(self, where: Where) -> PipelinedConnection:
        link = self._links.get(where)
        if link is None:
            if len(self._links) >= MOST_NODES:
                raise StoreFailed(Reason.CLUSTER_DOWN)
            node = target(self._address, self._access, where)
            link = self._links[where] = PipelinedConnection(node, self._timeout)
        return link

    def _refresh(self) -> None:
        """Read the topology in the background, unless that is or was just being done.

        Where nothing is known yet, at once: then the breaker sees to it that it is not done often.
        """
        loop = asyncio.get_running_loop()
        if self._refreshing is not None and not self._refreshing.done():
            return
        if self._slots and loop.time() < self._not_before:
            return
        if loop.time() > self._not_before + LONGEST_PAUSE:
            self._pause = FIRST_PAUSE  # what was learned last time says nothing about this one
        self._was_read.clear()
        self._refreshing = loop.create_task(self._read_topology())

    async def _read_topology(self) -> None:
        """Ask one node after the other, until one knows."""
        before = self._slots.copy()
        for where in dict.fromkeys((*self._owners, *self._address.hosts)):
            try:
                ranges = await self._link(where).send(_CLUSTER_SLOTS, shapes.SLOTS)
            except (StoreFailed, Redirect, NoScript):
                continue  # whoever needs it says so, and the next one tries again
            if slots := _owners_of(ranges, where[0]):
                self._slots, self._owners = slots, tuple(dict.fromkeys(slots.values()))
                break
        self._was_read.set()
        self._pause = FIRST_PAUSE if self._slots != before else min(2 * self._pause, LONGEST_PAUSE)
        pause = self._pause * (1 - random.random() / 2)  # noqa: S311 - spreads, guards nothing
        self._not_before = asyncio.get_running_loop().time() + pause
        for gone in [n for n, link in self._links.items() if n not in self._owners and link.rests]:
            await self._links.pop(gone).close()

    @override
    def anywhere(self) -> Target:
        node = random.choice(self._owners or self._address.hosts)  # noqa: S311 - any node will do
        return target(self._address, self._access, node)

    @override
    def use_access(self, access: Access) -> None:
        self._access = access
        for where, link in self._links.items():
            link.target = target(self._address, access, where)

    @override
    def __repr__(self) -> str:
        return f"Cluster({self._address.shown}, nodes={len(self._links)})"


def _owners_of(ranges: Reply, asked: str) -> dict[int, Where]:
    """Read CLUSTER SLOTS: first and last slot of each range, and its nodes, the master first.

    A node without a host, or with one that is not known, is behind the address that was asked.
    What is no range of slots tells nothing; nor does what follows, once there are too many slots.
    """
    slots: dict[int, Where] = {}
    left = SLOTS
    for part in ranges if isinstance(ranges, list) else ():
        match part:
            case [int(first), int(last), [host, int(port), *_], *_] if 0 <= first <= last < SLOTS:
                told = host.decode("utf-8", "replace") if isinstance(host, bytes) else ""
                owner = (asked if told in ("", UNKNOWN) else told, port)
                left -= last + 1 - first
                if is_node(*owner) and left >= 0:
                    slots.update(dict.fromkeys(range(first, last + 1), owner))
            case _:
                pass
    return slots


_NODE_IS_GONE = frozenset(
    {Reason.TIMEOUT, Reason.CONNECTION, Reason.READONLY, Reason.LOADING, Reason.CLUSTER_DOWN}
)


def nodes_at(address: StoreAddress, access: Access, timeout: float) -> Topology:
    """Return the servers at this address; opens nothing."""
    kind = Cluster if address.cluster else SingleServer
    return kind(address, access, timeout)


def target(address: StoreAddress, access: Access, where: Where | None = None) -> Target:
    """Return how a node is reached; without `where` the first one of the address."""
    host, port = where or (address.hosts[0] if address.hosts else ("", 0))
    tls = (access.tls or ssl.create_default_context()) if address.tls else None
    return Target(host, port, address.path, tls, access.username, access.password, address.db)
