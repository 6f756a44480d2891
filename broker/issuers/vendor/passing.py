"""The vendor's other routes over HTTP: a request as it came, and its answer as it comes.

Not a call of the broker's own: nothing is added but what an intermediary has to add, above all no
key.  Apart from `client`, whose connections mints need: however many requests are passed on, a mint
waits for none of them.  Like there, each has a connection of its own, because what is left of one
answer would be the beginning of the next caller's; redirects are the caller's to follow; bodies are
passed on as they are, compressed or not.
"""

import zlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus

import aiohttp
from aiohttp.hdrs import CONTENT_ENCODING
from multidict import CIMultiDict
from yarl import URL

from broker.issuers.vendor.client import (
    CONNECT_TIMEOUT,
    DNS_TTL,
    FAILURES,
    MAX_FIELD,
    MAX_FIELDS,
    USER_AGENT,
    Answer,
    CallFailed,
    credentials,
    impatient_socket,
    reason_of,
)
from broker.issuers.vendor.connection import VendorConnector
from broker.issuers.vendor.egress import Proxy
from broker.rules.passing import BadTarget, Field
from broker.telemetry.labels import Reason

READ_BUFFER = 32 * 1024
"""Bytes of an answer that are held for a caller who is slow (aiohttp allows twice that)."""

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
"""Tells zlib to look which of the two it is."""

_ADDED_BY_AIOHTTP = ("Accept", "Accept-Encoding", "Content-Type")
"""Headers that its client adds to requests without them."""


class PassedAnswer:
    """An answer whose head is here: `status`, `reason`, `headers`; its body by `chunk`."""

    def __init__(self, response: aiohttp.ClientResponse, proxy: Proxy | None) -> None:
        self.status = response.status
        self.reason = response.reason or ""
        self.headers = response.headers
        self._content = response.content
        self._proxy = proxy

    async def chunk(self) -> bytes:
        """Return what has come, nothing at the end; raises CallFailed where it breaks off."""
        try:
            return await self._content.readany()
        except FAILURES as error:
            raise CallFailed(reason_of(error, self._proxy)) from error


def unpacked(answer: PassedAnswer, content: bytes, most: int) -> Answer:
    """Return an answer whose body was read, unpacked to `most` bytes, so that its code is known.

    What cannot be unpacked stays as it is.
    """
    headers = CIMultiDict(answer.headers)
    if headers.get(CONTENT_ENCODING, "").lower() in {"gzip", "deflate"}:
        with suppress(zlib.error):
            content = zlib.decompressobj(_GZIP_OR_ZLIB).decompress(content, most)
            del headers[CONTENT_ENCODING]
    return Answer(answer.status, headers, content)


class PassThroughClient:
    """Sends requests of others to `base_url`; the proxy may be replaced at any time."""

    def __init__(self, base_url: str, proxy: Proxy | None = None) -> None:
        self.proxy = proxy
        self._base = base_url.removesuffix("/")
        self._prefix = URL(self._base, encoded=True).raw_path.removesuffix("/")
        self._session = aiohttp.ClientSession(
            connector=VendorConnector(DNS_TTL, impatient_socket, most=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            # how long nothing may happen, the caller of this knows: it sees both directions
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT),
            headers={"User-Agent": USER_AGENT},  # for callers that have none
            skip_auto_headers=_ADDED_BY_AIOHTTP,
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
        )

    @asynccontextmanager
    async def send(
        self, method: str, target: str, fields: Iterable[Field], body: AsyncIterator[bytes] | None
    ) -> AsyncIterator[PassedAnswer]:
        """Send a request whose `target` begins with a slash; raises CallFailed without an answer.

        The connection ends with the block.  Raises BadTarget for a target that would be sent in
        another form than it came in.
        """
        url, proxy = URL(self._base + target, encoded=True), self.proxy
        if url.raw_path_qs != self._prefix + target.removesuffix("?"):
            raise BadTarget("it has more than one form")
        request = self._session.request(
            method,
            url,
            data=body,
            proxy=None if proxy is None else proxy.url,
            proxy_headers=credentials(proxy),
            headers=CIMultiDict(fields),
            allow_redirects=False,
        )
        try:
            response = await request
        except FAILURES as error:
            raise CallFailed(reason_of(error, proxy)) from error
        try:
            if response.status < HTTPStatus.OK:  # 101: another protocol, which nobody asked for
                raise CallFailed(Reason.UNEXPECTED_STATUS)
            yield PassedAnswer(response, proxy)
        finally:
            response.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
