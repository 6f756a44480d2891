"""What replicas tell each other: subscribe once, be called for each message, for ever.

Messages are hints.  Whoever waits for one looks again by itself after a while, so a message that
was lost while the server was away costs a moment, not an outcome.

A connection that lives may deliver nothing: a middlebox has forgotten it, a node is cut off from
the others of its cluster, the process behind it stands still.  So where nothing has come for a
while, the replica sends itself a word by the way that its calls take.  If that is taken and does
not arrive, the subscription is made anew.  (PING would ask for one more right of the server's user,
and tells of the connection only, not of what passes through it.)
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence

import structlog
from typing_extensions import override

from broker.valkey.client import shapes
from broker.valkey.client.errors import Reason, StoreFailed
from broker.valkey.client.resp import Reader
from broker.valkey.client.scripts import command
from broker.valkey.client.target import CONNECT_TIMEOUT, Route, Target
from broker.valkey.client.topology import Topology

log = structlog.get_logger()

RETRY = 1.0
"""Seconds between attempts to subscribe."""

SILENCE = 5.0
"""Seconds without a message after which a replica sends itself one."""

ECHO_TIMEOUT = 2.0
"""Seconds in which that has to arrive: nodes of a cluster pass it on."""

AT_A_TIME = 100
"""Messages in a turn of the loop: a flood of them must not keep requests waiting."""

_ECHO = b"echo "

Listener = Callable[[bytes, bytes], None]
"""Gets channel and message."""


class Subscription(asyncio.Protocol):
    """One connection that does nothing but listen; `ready` and `ended` tell of its life.

    It ends with what a listener raised: the loop would take that for a fault of the connection.
    """

    def __init__(self, channels: Sequence[bytes], opening: bytes, on_message: Listener) -> None:
        loop = asyncio.get_running_loop()
        self._channels = channels
        self._opening = opening
        self._on_message = on_message
        self._loop = loop
        self._reader = Reader()
        self._echo = b""
        self._echoed: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self.messages = 0
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport
        assert self._transport is not None  # for the type checker, which was told otherwise
        self._transport.write(self._opening + command(b"SUBSCRIBE", *self._channels))

    @override
    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._deliver()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(StoreFailed(Reason.CONNECTION))
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()
        self._fail(StoreFailed(Reason.CONNECTION))
        for told in (self.ready, self.ended):
            if told.done() and not told.cancelled():
                told.exception()  # whoever ends it need not hear of that

    def expect(self) -> tuple[bytes, "asyncio.Future[None]"]:
        """Return a word, and what is done once it has arrived."""
        self._echo = _ECHO + secrets.token_hex(8).encode()
        self._echoed = self._loop.create_future()
        return self._echo, self._echoed

    def _deliver(self) -> None:
        """Hand on what has come, some at a time."""
        try:
            for _ in range(AT_A_TIME):
                if (reply := self._reader.take()) is False:
                    return
                self._take(reply)
        except StoreFailed:  # not the protocol
            if self._transport is not None:
                self._transport.abort()
        else:
            self._rest()

    def _rest(self) -> None:
        if self._transport is not None and not self.ended.done():
            self._transport.pause_reading()
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._transport is not None and not self.ended.done():
            self._transport.resume_reading()
            self._deliver()

    def _take(self, reply: object) -> None:
        match reply:
            case [b"message", bytes(channel), bytes(message)]:
                self.messages += 1
                if not message.startswith(_ECHO):
                    self._hand_on(channel, message)
                elif message == self._echo and not self._echoed.done():
                    self._echoed.set_result(None)
            case [b"subscribe", _, int(count)]:
                if count == len(self._channels) and not self.ready.done():
                    self.ready.set_result(None)
            case Exception():
                self._fail(shapes.SUBSCRIBE.error(reply))
            case _:
                pass  # it was let in, or chose its database

    def _hand_on(self, channel: bytes, message: bytes) -> None:
        try:
            self._on_message(channel, message)
        except BaseException as error:  # noqa: BLE001 - raised where the subscription is awaited
            if not self.ended.done():
                self.ended.set_exception(error)
            if self._transport is not None:
                self._transport.abort()

    def _fail(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)


async def listen(nodes: Topology, channels: Sequence[bytes], on_message: Listener) -> None:
    """Call `on_message` for each message on the channels, until cancelled; the first is our own."""
    route = Route()
    while True:
        target = nodes.anywhere()
        subscription = Subscription(channels, b"".join(target.greeting()), on_message)
        try:
            await subscribe(target, subscription, route)
            await _stay(nodes, channels[0], subscription)
        except (OSError, TimeoutError, StoreFailed):
            pass  # looked at again, with everything else, by whoever needs the store
        finally:
            subscription.close()
        route.avoid()
        await asyncio.sleep(RETRY)


async def subscribe(target: Target, subscription: Subscription, route: Route | None = None) -> None:
    """Connect and subscribe; raises OSError, TimeoutError, StoreFailed."""
    async with asyncio.timeout(CONNECT_TIMEOUT):
        await target.connect(lambda: subscription, route or Route())
        await subscription.ready


async def _stay(nodes: Topology, channel: bytes, subscription: Subscription) -> None:
    """Return when the subscription has ended, or delivers nothing any more.

    Raises what a listener raised.
    """
    while True:
        before = subscription.messages
        await asyncio.wait([subscription.ended], timeout=SILENCE)
        if subscription.ended.done():
            return subscription.ended.result()
        if subscription.messages != before:
            continue
        word, echoed = subscription.expect()
        try:
            _ = await nodes.command(channel, command(b"PUBLISH", channel, word), shapes.COUNTED)
        except StoreFailed:
            continue  # nobody can say anything: no word about this connection
        await asyncio.wait([echoed, subscription.ended], timeout=ECHO_TIMEOUT)
        if not echoed.done():
            log.warning("broker.news_silent")
            return None
