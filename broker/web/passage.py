"""One request on its way to the vendor and back: its bytes, and what to say when they stop."""

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator, Sequence

from aiohttp.web import RequestPayloadError
from aiohttp.web_request import BaseRequest
from msgspec import Struct

from broker import errors
from broker.issuers.vendor.client import CallFailed
from broker.issuers.vendor.passing import PassedAnswer
from broker.rules.passing import BadTarget
from broker.telemetry.labels import PassedOutcome, Reason
from broker.web import body
from broker.web.auth import Client
from broker.web.response import Answer

STALLED = 120.0
"""Seconds in which a byte has to move, in either direction: as long as the vendor's own clients
wait for an answer, which may be speech that is made meanwhile."""

FAILURES = (TimeoutError, CallFailed, RequestPayloadError, BadTarget, ConnectionError)
"""What ends one before its end."""

_NO_LINGER = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: closing sends RST instead of FIN."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class Passage(Struct):
    """One request on its way: what is known of it, and how far it has come.

    `limit` ends it when nothing moves; `status` is the vendor's, 0 before its head is here.
    """

    request: BaseRequest
    request_id: str
    client: Client
    route: str
    limit: asyncio.Timeout
    status: int = 0
    vendor_id: str = ""
    sent: int = 0
    received: int = 0
    is_begun: bool = False
    awaits_caller: bool = False
    broke_off: bool = False

    def moved(self) -> None:
        """Begin the time anew in which a byte has to move."""
        self.limit.reschedule(asyncio.get_running_loop().time() + STALLED)


async def upload(passage: Passage) -> AsyncIterator[bytes]:
    """Yield the body as the caller sends it."""
    request = passage.request
    body.invite(request)
    passage.awaits_caller = True
    try:
        while chunk := await request.content.readany():
            passage.awaits_caller = False
            passage.moved()
            yield chunk
            passage.sent += len(chunk)
            passage.awaits_caller = True
    except RequestPayloadError:
        passage.broke_off = True
        raise
    passage.awaits_caller = False
    passage.moved()


def head_of(
    answer: PassedAnswer,
    fields: Sequence[tuple[str, str]],
    request_id: str,
    *,
    chunked: bool,
    last: bool,
) -> bytes:
    """Return a head, byte for byte the vendor's but for what is between neighbours."""
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {value}" for name, value in fields]
    there = {name.lower() for name, _ in fields}
    if "x-request-id" not in there:
        lines.append(f"X-Request-Id: {request_id}")
    if "cache-control" not in there:
        lines.append("Cache-Control: no-store")
    if chunked:
        lines.append("Transfer-Encoding: chunked")
    if last:
        lines.append("Connection: close")
    if any(map(_CONTROL.search, lines)):
        raise CallFailed(Reason.UNEXPECTED_STATUS)
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


def verdict_on(passage: Passage, error: Exception) -> tuple[PassedOutcome, errors.BrokerError]:
    """Say whose fault it is, and what the caller is told if that can still be."""
    if passage.broke_off or isinstance(error, RequestPayloadError):
        return PassedOutcome.REFUSED, body.broken()
    if isinstance(error, TimeoutError) and passage.awaits_caller and not passage.status:
        stalled = errors.RequestTimeout(f"body: nothing came for {STALLED:g} s")
        return PassedOutcome.REFUSED, stalled
    if isinstance(error, ConnectionError) and passage.is_begun:
        return PassedOutcome.LEFT, errors.Internal()
    if isinstance(error, BadTarget):
        return PassedOutcome.REFUSED, refused_target(error)
    reason = error.reason if isinstance(error, CallFailed) else Reason.TIMEOUT
    outcome = PassedOutcome.BROKEN if passage.is_begun else PassedOutcome.FAILED
    if reason is Reason.TIMEOUT:
        failed: errors.BrokerError = errors.UpstreamTimeout("the vendor did not answer in time")
    else:
        failed = errors.UpstreamUnavailable(f"no answer from the vendor: {reason.value}")
    failed.reason = reason.value
    return outcome, failed


def refused_target(error: BadTarget) -> errors.Invalid:
    """Return what the caller is told of a target that is not passed on."""
    return errors.Invalid(f"target: {error}; such a request is not passed on")


def cut(request: BaseRequest) -> Answer:
    """End a connection whose answer cannot be completed, so that nobody takes it for complete.

    With a reset where there can be one: an answer without length or chunks, as HTTP/1.0 has, would
    be complete with any other end.
    """
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()
    return Answer(502, b"", b"", closes=True, is_written=True)
