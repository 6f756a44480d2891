"""The vendor over HTTP: one call, bounded in time and size.  Thin on purpose.

Redirects are not followed (the key would go along), bodies are not decompressed (a small one can
unfold to gigabytes), and at most as much is read as an answer can have.  What comes back is
status, headers and bytes: `vendor_api` says what they mean.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus

import aiohttp
from msgspec import Struct
from typing_extensions import override
from yarl import URL

from broker.issuers.vendor.api import MAX_BODY
from broker.issuers.vendor.connection import TooMuch, VendorConnector
from broker.issuers.vendor.egress import Proxy
from broker.model import Secret
from broker.telemetry.labels import Reason
from broker.version import VERSION

MINT_PATH = "/v1/embed-tokens/request"
VALIDATE_PATH = "/v1/validate"

CONNECT_TIMEOUT = 3.0
"""Seconds: nothing was sent yet, so whoever waits is told soon, and the slot of the budget, which
the call holds meanwhile, is free for one that may get through."""

VANISHED = 30.0
"""Seconds without an acknowledgement after which the kernel ends a connection (TCP_USER_TIMEOUT,
RFC 5482): a call on it can arrive no more, and must not hold its slot of the budget for longer."""

DNS_TTL = 60
"""Seconds that an address is remembered; a vendor that moves is found again within a minute."""

MAX_FIELD = 64 * 1024
"""Bytes of one header of an answer: edges add policies of ten kilobytes that nobody here reads."""

MAX_FIELDS = 512
"""Headers of an answer; a few dozen are usual."""

READ_BUFFER = 16 * 1024
"""Bytes of a body, or 16 times fewer chunks of it, that are parsed before somebody takes them:
16,000 chunks of a byte, which aiohttp would let pass, hold the event loop up for 40 ms."""

_TOO_LARGE = ("Got more than", "Too many headers")
"""How aiohttp's message begins when one of these two bounds is exceeded; it has no class for it."""

USER_AGENT = f"embed-token-broker/{VERSION}"


class CallFailed(Exception):
    """There was no complete answer; `reason` says how it failed."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Answer(Struct, frozen=True):
    """What came back: `headers` are a multidict, `body` at most one byte more than the bound."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @override
    def __repr__(self) -> str:
        return f"Answer({self.status}, {len(self.body)} bytes)"


_UNENDED = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT)


class VendorClient:
    """Calls to `base_url`; `timeout` is seconds for one call, connecting included.

    A mint is not ended by it: its caller says how long (`calls`).

    `proxy` may be replaced at any time; calls that begin later go through the new one.  Cookies are
    not kept: the next visitor's call would carry what an edge told about the one before.

    Each call has a connection of its own: what a vendor or its edge sends on an idle one (an answer
    too many, a 408) would be the answer to the next visitor's call, with somebody else's token.  At
    the budget's rate a handshake a call is affordable.  Connections are not limited: the budget
    bounds the calls, and one that waited for a place would look like a vendor that does not answer.
    """

    def __init__(self, base_url: str, timeout: float, proxy: Proxy | None = None) -> None:
        self.base_url = base_url
        self.timeout = timeout
        self.proxy = proxy
        base = URL(base_url)
        self._mint_url = base.joinpath(MINT_PATH[1:])
        self._validate_url = base.joinpath(VALIDATE_PATH[1:])
        self._session = aiohttp.ClientSession(
            connector=VendorConnector(DNS_TTL, impatient_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=timeout, connect=CONNECT_TIMEOUT),
            headers={
                "User-Agent": USER_AGENT,
                "Accept": "application/json",
                "Accept-Encoding": "identity",  # none at all would permit any (RFC 9110, 12.5.3)
            },
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
        )

    async def mint(
        self,
        key: Secret,
        body: bytes,
        headers: Mapping[str, str],
        arrived: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Ask for one token; raises CallFailed.  `arrived` is called at the head of the answer."""
        return await self._post(self._mint_url, key, body, headers, _UNENDED, arrived)

    async def validate(self, key: Secret) -> Answer:
        """Ask whether the key is good, which costs the vendor little; raises CallFailed."""
        return await self._post(self._validate_url, key, b"{}", {}, self._session.timeout)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def _post(
        self,
        url: URL,
        key: Secret,
        body: bytes,
        headers: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
        arrived: Callable[[], None] = lambda: None,
    ) -> Answer:
        proxy = self.proxy
        try:
            async with self._session.post(
                url,
                data=body,
                proxy=None if proxy is None else proxy.url,
                proxy_headers=credentials(proxy),
                headers={"api-secret": key.reveal(), "Content-Type": "application/json", **headers},
                allow_redirects=False,
                timeout=limits,
            ) as response:
                arrived()
                return Answer(response.status, response.headers, await _read(response))
        except FAILURES as error:
            raise CallFailed(reason_of(error, proxy)) from error


FAILURES = (aiohttp.ClientError, OSError, ValueError)
"""What a call raises that fails."""


def credentials(proxy: Proxy | None) -> Mapping[str, str] | None:
    """Return the header that tells a proxy who we are."""
    if proxy is None or proxy.authorization is None:
        return None
    return {"Proxy-Authorization": proxy.authorization.reveal()}


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read up to one byte beyond the bound: enough to see that it is exceeded."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            response.close()
            break
        await asyncio.sleep(0)  # a reader of many small chunks would never give way otherwise
    return bytes(body[: MAX_BODY + 1])


def reason_of(error: Exception, proxy: Proxy | None) -> Reason:
    """Say what went wrong with a call that went through this proxy, or through none."""
    if isinstance(error, TooMuch):
        return error.reason
    blamed = None if proxy is None else _proxy_reason(error)
    return blamed or _reason(error)


def _proxy_reason(error: Exception) -> Reason | None:
    """Say what the proxy has to do with it; None for what happened beyond it."""
    match error:
        case aiohttp.ClientHttpProxyError(status=HTTPStatus.PROXY_AUTHENTICATION_REQUIRED):
            return Reason.PROXY_AUTH
        case aiohttp.ClientHttpProxyError():
            return Reason.PROXY_REFUSED
        case aiohttp.ClientProxyConnectionError() | aiohttp.ClientConnectorDNSError():
            return Reason.PROXY_CONNECT  # a vendor's name is for the proxy to look up
        case _:
            return None


def _reason(error: Exception) -> Reason:
    match error:
        case asyncio.TimeoutError():  # aiohttp's own time-outs are of this class, too
            return Reason.TIMEOUT
        case aiohttp.ClientConnectorDNSError():
            return Reason.DNS
        case aiohttp.ClientSSLError() | aiohttp.ClientConnectorCertificateError():
            return Reason.TLS
        case aiohttp.ClientConnectorError():
            return Reason.CONNECT
        case aiohttp.ClientResponseError(message=message):
            too_large = message.startswith(_TOO_LARGE)
            return Reason.HEADERS_TOO_LARGE if too_large else Reason.NOT_JSON
        case _:
            return Reason.RESET


def impatient_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Make a socket whose connection the kernel ends when its peer has vanished."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere a call is given up in the end
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(VANISHED * 1000))
    return made
