"""What proxies say of their client: the URL it asked for, and its address.

Text in, values out: whose word counts is decided elsewhere.  Proxies write these headers in many
forms, and a client may have written what stands to the left of theirs.  Hence: addresses are read
from the right, one at a time, and what can be read in two ways is not read at all.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import unquote_plus

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_ABSOLUTE = re.compile(r"(?:http|ws)s?://[^/@\\\s]+/.*", re.IGNORECASE | re.DOTALL)
"""Without user and password, for some read as the host what stands before an @; and with a path: a
proxy that puts a client's `Host` before the request's target may have been told `h?token=...`."""

_PORT = r"(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]{1,64}))?"
_BRACKETED = re.compile(rf"\[([^\]]+)\]{_PORT}")
_DOTTED = re.compile(rf"([0-9.]+){_PORT}")
_OBFUSCATED = re.compile(rf"(_[A-Za-z0-9._-]{{1,64}}){_PORT}")
"""RFC 7239 section 6.3, but bounded: such a name becomes a key of a table."""

_VALUE = r'(?:"(?:[^"\\,]|\\[^,])*"|[^\s",;\\=]*)'
_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PAIR = re.compile(f"({_NAME})=({_VALUE})")
_ELEMENT = re.compile(rf"{_NAME}={_VALUE}(?:\s*;\s*{_NAME}={_VALUE})*;?")
"""One element of `Forwarded` (RFC 7239 section 4).  Ports and brackets without quotes are read, as
many proxies write them.  A comma within quotes is not: the header is cut at commas from the right,
so that a quote which a client left open swallows nothing that a proxy wrote behind it."""

_SITE = 64
"""Bits of an IPv6 address that name a subscriber; whoever has one has all that begin so."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are an IPv4 address, and all of IPv4 would be one /64."""


def tokens_in(url: str) -> tuple[str, ...]:
    """Return every `token` in the query of a path or of an absolute URL, as a viewer reads it.

    Raises ValueError for what viewers read in two ways.
    """
    if "#" in url:  # no browser sends one: some viewers end the query there, others do not
        raise ValueError("in a URI with a fragment, which a request cannot have")
    place, mark, query = url.partition("?")
    if mark and place and not place.startswith("/") and not _ABSOLUTE.fullmatch(place):
        raise ValueError("in a URI that is neither a path nor http://HOST/... without a user")
    tokens = _tokens_between("&", query)
    if ";" in query and tokens != _tokens_between("[&;]", query):
        raise ValueError("in a query with a semicolon, which some read as an ampersand")
    return tokens


def _tokens_between(separator: str, query: str) -> tuple[str, ...]:
    pairs = (pair.partition("=") for pair in re.split(separator, query))
    return tuple(unquote_plus(value) for name, _, value in pairs if unquote_plus(name) == "token")


def parse_ip(text: str) -> Address | None:
    """Read an IP address; an IPv4 address that IPv6 carries is one of IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def subject_of(address: Address) -> str:
    """Name whoever has this address: all of IPv4, the /64 of IPv6.

    A link-local address is one host, for all of them share one /64.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address in _NAT64:
        return str(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    if address.is_link_local:
        return str(address)[:64]
    return str(ipaddress.ip_network((int(address), _SITE), strict=False))


def client_subject(
    peer: Address | None, hops: Iterable[str], *, is_trusted: Callable[[Address], bool]
) -> str | None:
    """Name the client of a trusted peer; None if nothing tells it from other strangers.

    `peer` None is a Unix socket.  `hops` are what trusted proxies say, the nearest first; the walk
    ends at the first address that is not trusted, so that nothing which it says is looked at.
    """
    here = peer
    for hop in hops:
        address, name = _node(hop)
        if address is None:
            return f"{_sayer(here)} {name}" if name else None
        here = address
        if not is_trusted(address):
            break
    return _sayer(here)


def _sayer(address: Address | None) -> str:
    return "local" if address is None else subject_of(address)


def hops_from_right(forwarded_for: Sequence[str], forwarded: Sequence[str]) -> Iterator[str]:
    """Yield what each proxy said of its client, the nearest first.

    `forwarded_for` and `forwarded` are the lines of `X-Forwarded-For` and `Forwarded`, in order.
    Where the first says anything, the second is not looked at: most proxies write the first, and
    pass on what their client wrote into the other.
    """
    listed = list(_items_from_right(forwarded_for))
    if listed:
        yield from listed
        return
    for element in _items_from_right(forwarded):
        yield _for_of(element)


def _items_from_right(lines: Sequence[str]) -> Iterator[str]:
    for line in reversed(lines):
        for item in reversed(line.split(",")):
            if item.strip():  # RFC 9110 section 5.6.1: empty elements do not count
                yield item.strip()


def _for_of(element: str) -> str:
    """Return the `for` of an element, quotes taken off; empty if there is not exactly one."""
    if not _ELEMENT.fullmatch(element):
        return ""
    named = [value for name, value in _PAIR.findall(element) if name.lower() == "for"]
    return re.sub(r"\\(.)", r"\1", named[0]) if len(named) == 1 else ""


def _node(hop: str) -> tuple[Address | None, str]:
    """Read `IP`, `IP:PORT`, `[IP]`, `[IP]:PORT` or `_name`, quoted or not; else nothing."""
    if len(hop) > 1 and hop[0] == hop[-1] == '"':
        hop = hop[1:-1]
    hidden = _OBFUSCATED.fullmatch(hop)
    if hidden:
        return None, hidden[1]
    framed = _BRACKETED.fullmatch(hop) or _DOTTED.fullmatch(hop)
    return parse_ip(framed[1] if framed else hop), ""
