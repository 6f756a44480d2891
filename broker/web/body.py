"""Reading a small body: bounded while it arrives, and in time."""

import asyncio

from aiohttp.web import RequestPayloadError
from aiohttp.hdrs import CONTENT_ENCODING, EXPECT
from aiohttp.web_request import BaseRequest

from broker.errors import Invalid, PayloadTooLarge, RequestTimeout, UnsupportedType

BODY_TIMEOUT = 5.0
"""Seconds for 8 KiB from a backend: generous for any network, short for a socket that trickles."""


async def read(request: BaseRequest, limit: int) -> bytes:
    """Return the whole body.

    Raises PayloadTooLarge as soon as `limit` bytes are exceeded, RequestTimeout when it does not
    arrive, UnsupportedType for a content encoding, Invalid for broken framing.
    """
    headers = request.headers
    if CONTENT_ENCODING in headers and headers[CONTENT_ENCODING].lower() != "identity":
        raise UnsupportedType("content-encoding: send the body as it is, without compression")
    content = request.content
    if content.is_eof():
        try:
            body = content.read_nowait()
        except RequestPayloadError:
            raise _broken() from None
    else:
        body = await _read_slowly(request, limit)
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def _read_slowly(request: BaseRequest, limit: int) -> bytes:
    """Read what has not arrived with the head."""
    if request.headers.get(EXPECT, "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
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
        raise _broken() from None
    return bytes(body)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"body: more than {limit} bytes; send agent_id and fingerprint only")


def _broken() -> Invalid:
    return Invalid("body: broken transfer; send Content-Length or well-formed chunks")
