"""One connection to the vendor, or to a proxy on the way: bounded in all that it may bring.

aiohttp bounds each header, their number and what of a body waits to be read.  It does not bound

- interim answers (1xx, RFC 9110 section 15.2): it keeps all of them, and reads them without ever
  giving way to another task, so that whoever stands at the other end could stop the event loop for
  as long as a call may last.  Here they are dropped as they come, for no call waits for one;
- heads, trailers, chunk extensions and answers that nobody asked for, in all: here a connection
  that brings too many heads or bytes is ended, with an error that says which (of what is passed on
  as it comes, the heads alone);
- how long a body is waited for whose rest cannot be read (a chunk's length that is none): it closes
  the connection and tells nobody.  Here whoever reads the body is told.

A connection makes one call (`vendor_client`), so its bounds are those of an answer.

aiohttp offers no other way in than the protocol that its connector makes.  The names of 3.14 that
it does not promise to keep are used in this file only: `TCPConnector._factory`, `ResponseHandler`
with `feed_data` and `_payload`.
"""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.streams import StreamReader
from typing_extensions import override

from broker.telemetry.labels import Reason

SocketFactory = Callable[[aiohttp.AddrInfoType], socket.socket]

INTERIM = range(100, 200)
"""The statuses of RFC 9110 section 15.2."""

MAX_INTERIM = 16
"""Heads beside that of the answer; edges send one or two interim ones (100, 103)."""

MAX_HEADS = 256 * 1024
"""Bytes up to the end of the final head: the interim ones are counted in."""

MAX_BYTES = 512 * 1024
"""Bytes of a whole answer: the heads, and twice the largest body (`vendor_api.MAX_BODY`)."""

PIECE = 16 * 1024
"""Bytes that are parsed before the bounds are looked at: the event loop reads 256 KiB at once, and
those may be 16,000 heads."""


class TooMuch(aiohttp.ClientError):
    """The other end brought more than an answer may have; `reason` says of what."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class VendorConnection(ResponseHandler):
    """Counts what comes; ends itself at a bound: `most` bytes of an answer, None for any number."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int | None = MAX_BYTES) -> None:
        super().__init__(loop)
        self._most = most
        self._heads = 0
        self._bytes = 0
        self._is_answered = False
        self._is_ended = False

    @override
    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Take a head; whoever waits for the answer hears of the first final one only."""
        self._heads += 1
        if not (self._is_answered or _is_interim(data[0].code)):
            self._is_answered = True
            super().feed_data(data, size)

    @override
    def data_received(self, data: bytes) -> None:
        for start in range(0, max(len(data), 1), PIECE):  # of nothing: the parser is to go on
            if self._is_ended:
                return
            self._take(data[start : start + PIECE])

    def _take(self, piece: bytes) -> None:
        before = self.exception()
        super().data_received(piece)
        self._bytes += len(piece)
        if (excess := self._excess()) is not None:
            self._end(TooMuch(excess))
        elif self.exception() is not before:  # the parser's, which has closed the connection
            self._is_ended = True
            self._fail_body(aiohttp.ClientPayloadError())

    def _excess(self) -> Reason | None:
        """Say which bound is exceeded."""
        is_head_too_large = not self._is_answered and self._bytes > MAX_HEADS
        if self._heads > MAX_INTERIM + 1 or is_head_too_large:
            return Reason.HEADERS_TOO_LARGE
        is_too_large = self._most is not None and self._bytes > self._most
        return Reason.TOO_LARGE if is_too_large else None

    def _end(self, error: TooMuch) -> None:
        """Drop the connection; not by `abort`, which would forget the error."""
        self._is_ended = True
        self._fail_body(error)
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()

    def _fail_body(self, error: aiohttp.ClientError) -> None:
        """Tell whoever reads the body; a body that is whole stays."""
        body, self._payload = self._payload, None
        if body is not None and not body.is_eof():
            body.set_exception(error)


class VendorConnector(aiohttp.TCPConnector):
    """Makes `VendorConnection`s, one a call: to the vendor, to a proxy, inside of its tunnel."""

    def __init__(
        self, ttl_dns_cache: int, socket_factory: SocketFactory, most: int | None = MAX_BYTES
    ) -> None:
        super().__init__(
            limit=0, force_close=True, ttl_dns_cache=ttl_dns_cache, socket_factory=socket_factory
        )
        self._factory = partial(_connection, loop=self._loop, most=most)


def _connection(loop: asyncio.AbstractEventLoop, most: int | None) -> ResponseHandler:
    return VendorConnection(loop, most)


def _is_interim(status: int) -> bool:
    """Whether another answer follows; after 101 comes another protocol (RFC 9110, 15.2.2)."""
    return status in INTERIM and status != HTTPStatus.SWITCHING_PROTOCOLS
