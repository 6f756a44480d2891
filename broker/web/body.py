"""Reading a small body: bounded while it arrives, and in time."""

import asyncio

from aiohttp.hdrs import CONTENT_ENCODING, EXPECT
from aiohttp.web import RequestPayloadError
from aiohttp.web_request import BaseRequest
from multidict import CIMultiDictProxy

from broker.errors import Invalid, PayloadTooLarge, RequestTimeout, UnsupportedType
from broker.web.whole_request import Request, WholeRequest

BODY_TIMEOUT = 5.0
"""Seconds for 8 KiB from a backend: generous for any network, short for a socket that trickles."""


def require_plain(headers: "CIMultiDictProxy[str]") -> None:
    """Raise UnsupportedType for a content encoding."""
    if CONTENT_ENCODING in headers and headers[CONTENT_ENCODING].lower() != "identity":
        raise UnsupportedType("content-encoding: send the body as it is, without compression")


def arrived(request: Request, limit: int) -> bytes | None:
    """Return the body if all of it came with the head, which small ones do; None if not.

    Raises PayloadTooLarge, Invalid for broken framing.
    """
    if isinstance(request, WholeRequest):
        body = request.body
    elif request.content.is_eof():
        try:
            body = request.content.read_nowait()
        except RequestPayloadError:
            raise broken() from None
    else:
        return None
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def read(request: Request, limit: int) -> bytes:
    """Return all of a body, as soon as it has come.

    Raises PayloadTooLarge as soon as `limit` bytes are exceeded, RequestTimeout when it does not
    come in time, Invalid for broken framing.
    """
    content = arrived(request, limit)
    if content is not None or isinstance(request, WholeRequest):
        return content or b""
    invite(request)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestTimeout(f"body: did not arrive within {BODY_TIMEOUT:g} s") from None
    except RequestPayloadError:
        raise broken() from None
    return bytes(body)


def invite(request: BaseRequest) -> None:
    """Tell a client that waits for it that its body is read."""
    if (
        request.headers.get(EXPECT, "").lower() == "100-continue"
        and request.version >= (1, 1)  # RFC 9110 section 10.1.1: older clients know no 100
        and request.transport is not None
    ):
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"body: more than {limit} bytes; send agent_id and fingerprint only")


def broken() -> Invalid:
    """Return what the sender of a body is told whose framing broke."""
    return Invalid("body: broken transfer; send Content-Length or well-formed chunks")
