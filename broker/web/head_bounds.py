"""How much a request's head may hold, and what can be told of one that aiohttp has read."""

from aiohttp import StreamReader
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong

from broker.errors import HeadTooLarge

HEAD_TIMEOUT = 20.0
"""Seconds from the first byte of a head to its end; Apache's figure.  A balancer sends a head in
one piece, so only a socket that trickles takes longer."""

MAX_FIELD = 32 * 1024
"""Bytes of the target, and of one header's value: 16 KB of cookies (browsers allow 4 KB for each of
many), a `Referer` or a forwarded URI with a token in it fit twice."""

MAX_HEAD = 64 * 1024
"""Bytes of a whole head: what large balancers pass on at most (Envoy 60 KiB, AWS 64 KB)."""

MAX_FIELDS = 128
"""Headers in a head: more than any proxy adds (Apache allows 100), and each takes time to read."""

_TOO_MANY_FIELDS = "Too many headers received"
"""How aiohttp's parser says that there are more than MAX_FIELDS: it has no class of its own."""

HEAD_TOO_LARGE = HeadTooLarge(
    f"request head: more than {MAX_FIELD} bytes in one line, {MAX_HEAD} in all or {MAX_FIELDS}"
    " headers; send fewer cookies, or let the proxy in front drop what the broker does not need"
)


def size_of(message: object) -> int:
    """Bytes of a head, as good as: line ends and blanks of headers are taken as four."""
    if not isinstance(message, RawRequestMessage):
        return 0
    return len(message.path) + sum(
        len(name) + len(value) + 4 for name, value in message.raw_headers
    )


def host_error(message: object) -> ValueError | None:
    """Return what is wrong with the host that a target names, such as broken Punycode.

    Nearly all requests name a path, and no host (RFC 9112 section 3.2).  After `CONNECT` and a bare
    line end aiohttp's parser gives a request without any target.
    """
    if isinstance(message, RawRequestMessage) and not (message.path or "").startswith("/"):
        if not message.path:
            return ValueError("no target")
        try:
            _ = message.url.host
        except ValueError as error:
            return error
    return None


def is_followed(data: bytes, body: StreamReader) -> bool:
    """Whether `data` has more than the one request that ends in it, or cannot be told."""
    end = data.find(b"\r\n\r\n") + 4
    return not body.is_eof() or len(data) - end != body.total_bytes


def is_too_large(error: BaseException, message: str) -> bool:
    """Whether this is how aiohttp's parser refuses a head for its size."""
    return isinstance(error, LineTooLong) or message == _TOO_MANY_FIELDS
