"""How an answer goes onto the wire: whole, late, in part, or not at all.

Knows sockets and aiohttp.  Does not know what the answer says.  Whatever waits here waits on
nothing but the connection, so that cancelling the handler always ends it.
"""

import asyncio
import socket
import struct
from typing import NoReturn, assert_never

from aiohttp import web
from msgspec import Struct

from broker.testing.vendor.replies import Answer

_NO_LINGER = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: closing sends RST instead of FIN and forgets what was not sent."""


_ZEROS = bytes(64 * 1024)


class Whole(Struct, frozen=True):
    """The answer as it is."""


class Hang(Struct, frozen=True):
    """Nothing, until the caller goes or the vendor closes."""


class Reset(Struct, frozen=True):
    """RST, after the headers and the first `after` bytes of the body; None: before anything."""

    after: int | None = None


class Cut(Struct, frozen=True):
    """Less than was promised.

    Content-Length is `extra` bytes longer than the body, and of the body only the first `after`
    bytes are sent (None: all).  Then the connection is closed or, with `hold`, left open.
    """

    after: int | None = None
    extra: int = 0
    hold: bool = False


class Drip(Struct, frozen=True):
    """The headers at once, then `chunk` bytes of the body every `interval` seconds."""

    interval: float = 1.0
    chunk: int = 1


class Flood(Struct, frozen=True):
    """`size` zero bytes instead of the body, none of which is in memory for long.

    With `framed` their number is told before, else they come in chunks.
    """

    size: int
    framed: bool = True


Delivery = Whole | Hang | Reset | Cut | Drip | Flood


def answers(delivery: Delivery) -> bool:
    """Whether the caller gets at least a status line."""
    return not isinstance(delivery, Hang) and delivery != Reset()


async def deliver(
    request: web.BaseRequest, answer: Answer, delivery: Delivery
) -> web.StreamResponse:
    """Send the answer this way; what is returned is for aiohttp to finish."""
    match delivery:
        case Whole():
            return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
        case Hang():
            return await _for_ever()
        case Reset():
            return await _reset(request, answer, delivery.after)
        case Cut():
            return await _cut(request, answer, delivery)
        case Drip():
            return await _drip(request, answer, delivery)
        case Flood():
            return await _flood(request, answer, delivery)
        case _:
            assert_never(delivery)


async def _begin(request: web.BaseRequest, answer: Answer, length: int) -> web.StreamResponse:
    """Send the status line and the headers, with this Content-Length."""
    stream = web.StreamResponse(status=answer.status, headers=answer.headers)
    stream.content_length = length
    await stream.prepare(request)
    return stream


async def _reset(request: web.BaseRequest, answer: Answer, after: int | None) -> web.StreamResponse:
    if after is None:
        _abort(request)
        return web.Response()
    stream = await _begin(request, answer, len(answer.body))
    await stream.write(answer.body[:after])
    _abort(request)
    return stream


async def _cut(request: web.BaseRequest, answer: Answer, cut: Cut) -> web.StreamResponse:
    stream = await _begin(request, answer, len(answer.body) + cut.extra)
    await stream.write(answer.body[: cut.after])
    if cut.hold:
        await _for_ever()
    if request.transport is not None:
        request.transport.close()
    return stream


async def _drip(request: web.BaseRequest, answer: Answer, drip: Drip) -> web.StreamResponse:
    stream = await _begin(request, answer, len(answer.body))
    for start in range(0, len(answer.body), drip.chunk):
        await stream.write(answer.body[start : start + drip.chunk])
        await asyncio.sleep(drip.interval)
    return stream


async def _flood(request: web.BaseRequest, answer: Answer, flood: Flood) -> web.StreamResponse:
    stream = web.StreamResponse(status=answer.status, headers=answer.headers)
    if flood.framed:
        stream.content_length = flood.size
    await stream.prepare(request)
    for start in range(0, flood.size, len(_ZEROS)):
        await stream.write(_ZEROS[: flood.size - start])
    return stream


def _abort(request: web.BaseRequest) -> None:
    """Close with RST."""
    if request.transport is None:
        return
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    request.transport.abort()


async def _for_ever() -> NoReturn:
    """Wait to be cancelled.  No timer is set, so a virtual clock does not run off meanwhile."""
    while True:
        await asyncio.get_running_loop().create_future()
